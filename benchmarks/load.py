"""A load generator with low overhead: each of N connections sends the next request after each response.

It uses raw asyncio streams and prepared requests, because the client shares the cores with the
server. Loopback only. `python benchmarks/load.py URL FOLDER --connections 32 --seconds 6`
prints one JSON line.
"""

import argparse
import asyncio
import ipaddress
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

BOUNDARY = "--------sopdeploy-benchmark"
CLIENTS = 4  # of `put_loads`
WARM_UP_SECONDS = 1.0
START_SECONDS = 120.0  # a start takes 6 to 21 s on an H200


@dataclass(frozen=True, slots=True)
class Load:
    """Measurements of a run; latencies in milliseconds.

    `answered` counts the images of the measured seconds, `all_answered` also those before and
    after.
    """

    images_per_s: float
    answered: int
    all_answered: int
    p50_ms: float
    p99_ms: float
    codes: dict[str, int]

    @property
    def refused(self) -> int:
        """The number of responses other than 200."""
        return sum(count for code, count in self.codes.items() if code != "200")


def put_loads(url: str, folder: Path, seconds: float, connections: int) -> Load:
    """Put load from `CLIENTS` processes of this program, because one would be the limit of a fast server.

    Each latency is the median over the processes.
    """
    with ThreadPoolExecutor(CLIENTS) as pool:
        options = "--connections", connections // CLIENTS
        sent = [pool.submit(put_load, url, folder, seconds, *options) for _ in range(CLIENTS)]
        loads = [one.result() for one in sent]
    return Load(
        images_per_s=sum(load.images_per_s for load in loads),
        answered=sum(load.answered for load in loads),
        all_answered=sum(load.all_answered for load in loads),
        p50_ms=statistics.median(load.p50_ms for load in loads),
        p99_ms=statistics.median(load.p99_ms for load in loads),
        codes=dict(sum((Counter(load.codes) for load in loads), Counter[str]())),
    )


def put_load(url: str, folder: Path, seconds: float, *options: object) -> Load:
    """Run this program for *seconds* with further *options* in another process; return its measurements."""
    command = [
        sys.executable,
        __file__,
        url,
        str(folder),
        "--seconds",
        str(seconds),
        *map(str, options),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds + START_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"no load on {url}: {done.stderr.strip().splitlines()[-1:]}")
    return Load(**json.loads(done.stdout))


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `sopdeploy serve` with *arguments* on a free port; yield the process and its URL, and end it.

    A server that is not ready after `START_SECONDS` is killed, and raises a `RuntimeError`.
    """
    command = [sys.executable, "-m", "sopdeploy", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(START_SECONDS, process.kill)
        limit.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
            limit.cancel()
            if not line.startswith("ready: "):
                raise RuntimeError(
                    f"the server ended with exit code {process.wait()}, or was not ready after "
                    f"{START_SECONDS:.0f} s; stderr says why"
                )
            yield process, line.split()[1]
        finally:
            limit.cancel()
            process.kill()


def requests(url: str, folder: Path, form: bool, header: str = "") -> list[bytes]:
    """Build one HTTP request per file in *folder*, with the file as body or as form field `file`.

    *header* is a further line of every request.
    """
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    found = []
    for path in sorted(folder.iterdir()):
        body, kind = path.read_bytes(), "image/jpeg"
        if form:
            disposition = 'Content-Disposition: form-data; name="file"; filename="a.jpg"'
            head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: image/jpeg\r\n\r\n"
            body = head.encode() + body + f"\r\n--{BOUNDARY}--\r\n".encode()
            kind = f"multipart/form-data; boundary={BOUNDARY}"
        head = f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {kind}\r\n"
        if header:
            head += f"{header}\r\n"
        found.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return found


class Run:
    """Puts load on one server for one measurement."""

    def __init__(
        self,
        url: str,
        bodies: list[bytes],
        connections: int,
        seconds: float,
        *,
        reconnects: bool = False,
    ) -> None:
        """Send *bodies* in turns; with *reconnects*, each over a connection of its own."""
        parts = urlsplit(url)
        if not ipaddress.ip_address(str(parts.hostname)).is_loopback:
            raise SystemExit(f"{url}: must be a loopback address")
        self._address = (str(parts.hostname), int(parts.port or 80))
        self._bodies: Iterator[bytes] = itertools.cycle(bodies)
        self._connections = connections
        self._seconds = seconds
        self._reconnects = reconnects
        self._latencies: list[float] = []
        self._codes: Counter[str] = Counter()
        self._all_answered = 0

    async def measure(self) -> Load:
        """Warm up for `WARM_UP_SECONDS`, then measure."""
        start = time.perf_counter() + WARM_UP_SECONDS
        end = start + self._seconds
        await asyncio.gather(
            *(self._request_loop(start, end) for _ in range(self._connections))
        )
        times = sorted(self._latencies) or [0.0]
        return Load(
            images_per_s=len(self._latencies) / self._seconds,
            answered=len(self._latencies),
            all_answered=self._all_answered,
            p50_ms=1000 * statistics.median(times),
            p99_ms=1000 * times[int(0.99 * (len(times) - 1))],
            codes=dict(self._codes),
        )

    async def _request_loop(self, start: float, end: float) -> None:
        writer = None
        while (sent := time.perf_counter()) < end:
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection(*self._address)
                writer.write(next(self._bodies))
                code = await read_response(reader)
            except (ConnectionError, asyncio.IncompleteReadError):
                code = "closed"
            self._record(code, sent, start, end)
            # After an error, the server may close the connection.
            if (self._reconnects or code != "200") and writer is not None:
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    def _record(self, code: str, sent: float, start: float, end: float) -> None:
        now = time.perf_counter()
        self._all_answered += code == "200"
        if start <= now <= end:
            self._codes[code] += 1
            if code == "200":
                self._latencies.append(now - sent)


async def read_response(reader: asyncio.StreamReader) -> str:
    """Read one response and return its status code."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    if lines.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).strip() or b"0", 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(lines.get("content-length", "0")))
    return head.split(" ", 2)[1]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", action="store_true")
    parser.add_argument("--header", default="", help="a further line of every request")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--reconnect", action="store_true", help="for each request")
    arguments = parser.parse_args()
    bodies = requests(arguments.url, arguments.folder, arguments.form, arguments.header)
    run = Run(
        arguments.url,
        bodies,
        arguments.connections,
        arguments.seconds,
        reconnects=arguments.reconnect,
    )
    print(json.dumps(asdict(asyncio.run(run.measure()))))


if __name__ == "__main__":
    main()
