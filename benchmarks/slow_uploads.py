"""Memory of the server and latency of small requests while many clients upload large bodies slowly.

    python benchmarks/slow_uploads.py bundles/NAME --clients 100 --megabytes 19 --seconds 20

Starts `sopdeploy serve` twice, with the limit on bytes in memory and practically without it. The clients
send at the same rate while a small image is posted ten times a second. Measures the resident memory before
and at its peak, the results of the uploads, and the latency of the small images.
"""

import argparse
import asyncio
import collections
import io
import resource
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

from load import serving
from measure import Result, make_parser, report
from PIL import Image

HEAD = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
PIECE_SECONDS = 0.1


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--megabytes", type=float, default=19)
    parser.add_argument("--seconds", type=float, default=20, help="duration of one upload")
    given = parser.parse_args()
    limited, unlimited = (measure(given, limit) for limit in (256_000_000, 10**12))
    units = {"resident memory before": "MB", "peak resident memory": "MB", "small image, median": "ms"}
    results = [
        Result(
            case=case,
            against="no limit",
            ours=value,
            other=unlimited.get(case, 0),
            unit=units.get(case, "ms" if case.startswith("small image,") else "requests"),
            runs=1,
        )
        for case, value in limited.items()
    ]
    report(results, as_json=given.json)


def measure(given: argparse.Namespace, limit: int) -> dict[str, float]:
    """Start a server whose `max_upload_bytes` is *limit* and measure it under load."""
    settings = ("--setting", f"max_upload_bytes={limit}", "--setting", "request_timeout=120")
    with serving(str(given.bundle), *settings) as (process, url):
        parts = urlsplit(url)
        return asyncio.run(load(given, (str(parts.hostname), parts.port or 0), process.pid))


async def load(given: argparse.Namespace, address: tuple[str, int], pid: int) -> dict[str, float]:
    """Upload from all clients while posting a small image repeatedly; return the measurements by name."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    small = file.getvalue()
    for _ in range(5):
        await post(address, small, 1, 0)
    before = resident(pid)
    peak, small_results, seconds = before, collections.Counter[str](), []
    pieces = round(given.seconds / PIECE_SECONDS)
    body = bytes(round(given.megabytes * 1e6))
    uploads = [asyncio.create_task(post(address, body, pieces, PIECE_SECONDS)) for _ in range(given.clients)]
    while not all(task.done() for task in uploads):
        started = time.monotonic()
        small_results[await post(address, small, 1, 0)] += 1
        seconds.append(time.monotonic() - started)
        peak = max(peak, resident(pid))
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    ended = collections.Counter(task.result() for task in uploads)
    return {
        "resident memory before": before,
        "peak resident memory": peak,
        "small image, median": 1000 * statistics.median(seconds),
        "small image, slowest": 1000 * max(seconds),
        **{f"uploads with result {status}": count for status, count in ended.items()},
        **{f"small images with result {status}": count for status, count in small_results.items()},
    }


async def post(address: tuple[str, int], body: bytes, pieces: int, pause: float) -> str:
    """Send *body* in *pieces* parts, *pause* seconds apart; return the status, `closed` or `reset`."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(HEAD.format(len(body)).encode())
        size = -(-len(body) // pieces)
        for start in range(0, len(body), size):
            writer.write(body[start : start + size])
            await writer.drain()
            await asyncio.sleep(pause)
            if reader._buffer:  # type: ignore[attr-defined] # the response arrived before the body was sent
                break
        return (await reader.read(12)).decode()[9:] or "closed"
    except ConnectionError:
        return "reset"
    finally:
        writer.close()


def resident(pid: int) -> int:
    """Return the resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 1e6)


if __name__ == "__main__":
    main()
