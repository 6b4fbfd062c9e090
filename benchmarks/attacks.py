"""What ordinary photographs and `/livez` get while others attack the server.

    python benchmarks/attacks.py [--seconds 15] [--front-ends 2] [--only "slow bodies"] [--json]

The server is `sopdeploy serve` with a network for digits and ONNX Runtime on the CPU. Two
clients send ordinary photographs one after the other, and each answer is compared with that of
the idle server. A prober opens a connection for `/livez` every `PROBE_SECONDS`. Each attack runs in a
process of its own with `CONNECTIONS` connections from each of `ADDRESSES` addresses, for some
seconds. The first row has no attack. A flood on `/livez` itself is the measure of the others:
beside it a probe waits because the cores are busy, not because the server is blocked.
"""

import argparse
import asyncio
import base64
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from load import BOUNDARY, read_response, serving
from measure import Result, make_parser, markdown, report
from serving_alone import KINDS, write_images
from soak import digits_bundle
from soak_clients import CLOSE, largest_difference

ADDRESSES, CONNECTIONS = 12, 4  # of each attack; 127.0.0.2 is the first address
PROBE_SECONDS = 0.05
PAUSE_SECONDS = 0.1  # between two photographs of an ordinary client
SILENT = 40  # connections per address of clients that send or read nothing
WAIT_SECONDS = 60.0
IDLE = "no attack"
BASE = "flood of /livez"
LEAVING = "bodies that end early"

COUNTS = ("right", "wrong", "refused", "lost", "probe failed")  # of answers
SHARES = (0.5, 0.95)  # of the times of probes, for their quantiles

Body = tuple[str, bytes]  # content type, bytes


# --- Requests of the attacks ---


def build_request(path: str, kind: str = "", body: bytes = b"") -> bytes:
    """Build a request: a GET without *kind*, otherwise a POST of *body*."""
    if not kind:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def build_form(files: Sequence[bytes]) -> Body:
    """Build a form with *files*, all in fields of the same name."""
    head = b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    parts = (f"--{BOUNDARY}\r\n".encode() + head + file + b"\r\n" for file in files)
    content = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return f"multipart/form-data; boundary={BOUNDARY}", content


def build_list(images: Sequence[bytes]) -> Body:
    """Build a JSON document with a list of *images*."""
    encoded = [base64.b64encode(image).decode("ascii") for image in images]
    return "application/json", json.dumps({"images": encoded}).encode()


def list_undecodable(photograph: bytes) -> list[bytes]:
    """List files that are not images that a server decodes: text, HEIC, PDF, empty, cut."""
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(20_000)
    return [b"text" * 5000, heic, b"%PDF-1.7\n" + bytes(20_000), b"", photograph[:2000]]


def build_requests(name: str, folder: Path) -> list[bytes]:
    """Build the requests that the attack *name* sends in turns, of the images below *folder*."""
    photograph = next((folder / "500 x 375").iterdir()).read_bytes()
    large = [path.read_bytes() for path in sorted((folder / "12 MP").iterdir())]
    progressive = next((folder / "12 MP, progressive").iterdir()).read_bytes()
    classify = "/v1/classify"
    undecodable = list_undecodable(photograph)
    nested = b'{"images": ' + b"[" * 2_000_000
    pages = ("/metrics", "/openapi.json", "/docs", "/v1/card", "/", "/nowhere")
    bodies: Mapping[str, Callable[[], list[bytes]]] = {
        BASE: lambda: [build_request("/livez")],
        "flood of pages": lambda: [build_request(path) for path in pages],
        "flood of photographs": lambda: [build_request(classify, "image/jpeg", photograph)],
        "photographs of 12 MP": lambda: [build_request(classify, "image/jpeg", large[0])],
        "progressive, 12 MP": lambda: [build_request(classify, "image/jpeg", progressive)],
        "lists of 8 of 12 MP": lambda: [build_request(classify, *build_list(large[:1] * 8))],
        "files that are not images": lambda: [
            build_request(classify, "image/jpeg", body) for body in undecodable
        ],
        "forms of 11 that are not images": lambda: [
            build_request(classify, *build_form([*(undecodable * 3)[:11], photograph]))
        ],
        "brackets in JSON": lambda: [build_request(classify, "application/json", nested)],
        "no HTTP": lambda: [b"\x16\x03\x01" + bytes(2000), b"GET / HTTP/9\r\n" * 200],
        "slow bodies": lambda: [build_request(classify, "image/jpeg", large[0])],
        "unread answers": lambda: [build_request("/openapi.json") * 50],
        "connections without a request": lambda: [b""],
        LEAVING: lambda: [
            request[: len(request) // 2]
            for request in [build_request(classify, "image/jpeg", large[0])]
        ],
    }
    return bodies[name]()


# --- Attackers, in a process of their own ---


@dataclass(frozen=True, slots=True)
class Attacker:
    """Sends the requests of an attack from one address until it is ended."""

    host: str
    port: int
    source: str

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            self.host, self.port, local_addr=(self.source, 0), limit=1 << 24
        )

    async def repeat(self, requests: Iterator[bytes]) -> None:
        """Send the next request after each answer; open a connection where the last was closed."""
        while True:
            with suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError):
                reader, writer = await self._open()
                try:
                    while True:
                        writer.write(next(requests))
                        if await read_response(reader) != "200":
                            break
                finally:
                    writer.close()
            await asyncio.sleep(0.005)

    async def stay(self, request: bytes, piece: int) -> None:
        """Send *piece* bytes of *request* a second, read nothing, and begin again if it is closed."""
        while True:
            with suppress(OSError):
                _, writer = await self._open()
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                for start in itertools.count(0, piece):
                    writer.write(request[start : start + piece])
                    await asyncio.sleep(1)
                    if writer.transport.is_closing():
                        break
            await asyncio.sleep(0.05)

    async def leave(self, requests: Iterator[bytes]) -> None:
        """Send the next request, and disconnect without an answer."""
        while True:
            with suppress(OSError):
                _, writer = await self._open()
                writer.write(next(requests))
                await asyncio.sleep(0.02)
                writer.transport.abort()


async def attack(name: str, url: str, folder: Path) -> None:
    """Run the attack *name* on the server at *url* until this process is ended."""
    parts = urlsplit(url)
    requests = build_requests(name, folder)
    tasks = []
    for number in range(2, 2 + ADDRESSES):
        attacker = Attacker(str(parts.hostname), int(parts.port or 80), f"127.0.0.{number}")
        if name == LEAVING:
            tasks += [attacker.leave(itertools.cycle(requests)) for _ in range(CONNECTIONS)]
        elif name in {"slow bodies", "connections without a request"}:
            tasks += [attacker.stay(requests[0], 1000) for _ in range(SILENT)]
        elif name == "unread answers":
            tasks += [attacker.stay(requests[0], 1 << 20) for _ in range(SILENT)]
        else:
            tasks += [attacker.repeat(itertools.cycle(requests)) for _ in range(CONNECTIONS)]
    await asyncio.gather(*tasks)


@contextmanager
def attacking(name: str, url: str, folder: Path) -> Iterator[None]:
    """Run the attack *name* in another process; nothing for `IDLE`."""
    if name == IDLE:
        yield
        return
    command = [
        sys.executable,
        __file__,
        "--attack",
        name,
        "--url",
        url,
        "--folder",
        str(folder),
    ]
    with subprocess.Popen(command) as process:
        try:
            time.sleep(2)  # its imports
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the attack {name!r} ended with code {process.returncode}")
        finally:
            process.kill()


# --- Ordinary clients ---


@dataclass(slots=True)
class Watch:
    """What ordinary clients got: numbers of answers, and their times in seconds."""

    answers: Counter[str] = field(default_factory=Counter)
    photographs: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)


async def ask(url: str, request: bytes) -> tuple[str, bytes]:
    """Send *request* on a new connection; return the status code and the body of the answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionError("no answer")
    return head.split()[1].decode(), body


def read_classes(body: bytes) -> dict[str, float]:
    """Read the probabilities by label of an answer."""
    return {item["label"]: item["probability"] for item in json.loads(body)["classes"]}


async def send_photographs(
    url: str, watch: Watch, expected: Mapping[bytes, Mapping[str, float]]
) -> None:
    """Send the photographs of *expected* in turns, and compare each answer with the expected one."""
    for request in itertools.cycle(expected):
        start = time.perf_counter()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                status, body = await ask(url, request)
        except (OSError, TimeoutError):
            watch.answers["lost"] += 1
        else:
            if status != "200":
                watch.answers["refused"] += 1
            else:
                watch.photographs.append(time.perf_counter() - start)
                difference = largest_difference(read_classes(body), expected[request])
                is_right = difference <= CLOSE
                watch.answers["right" if is_right else "wrong"] += 1
        await asyncio.sleep(PAUSE_SECONDS)


async def probe(url: str, watch: Watch) -> None:
    """Ask `/livez` every `PROBE_SECONDS` on a new connection."""
    request = build_request("/livez")
    while True:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                status, _ = await ask(url, request)
            watch.answers["probe failed"] += status != "200"
        except (OSError, TimeoutError):
            watch.answers["probe failed"] += 1
        watch.probes.append(time.perf_counter() - start)
        await asyncio.sleep(PROBE_SECONDS)


async def watch_server(
    url: str, seconds: float, expected: Mapping[bytes, Mapping[str, float]]
) -> Watch:
    """Run two ordinary clients and a prober for *seconds*."""
    watch = Watch()
    clients = [send_photographs(url, watch, expected) for _ in range(2)]
    tasks = [asyncio.create_task(one) for one in (*clients, probe(url, watch))]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    for failure in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(failure, Exception):
            raise failure
    return watch


# --- The table ---


def quantile_ms(seconds: Sequence[float], share: float) -> float:
    """Return a quantile of times in milliseconds; infinite without times."""
    if not seconds:
        return float("inf")
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def list_results(watches: Mapping[str, Watch]) -> Iterator[Result]:
    """List the values of each attack; those of `/livez` stand beside a flood of `/livez`."""
    base = watches.get(BASE)
    for name, watch in watches.items():
        for answer in COUNTS:
            count = watch.answers[answer]
            yield Result(case=f"{name}: {answer}", ours=count, unit="answers", runs=1)
        photographs = quantile_ms(watch.photographs, 0.5)
        yield Result(case=f"{name}: photograph, p50", ours=photographs, unit="ms", runs=1)
        for share in SHARES:
            yield Result(
                case=f"{name}: /livez, p{100 * share:.0f}",
                ours=quantile_ms(watch.probes, share),
                unit="ms",
                runs=1,
                against=BASE if base is not None else "",
                other=None if base is None else quantile_ms(base.probes, share),
            )


def format_table(watches: Mapping[str, Watch]) -> str:
    """Format a row for each attack: what ordinary clients got, and the times in milliseconds."""
    head = [
        "attack",
        *COUNTS,
        "photograph, p50 ms",
        *(f"/livez, p{100 * q:.0f} ms" for q in SHARES),
    ]
    rows = [
        [
            name,
            *(watch.answers[answer] for answer in COUNTS),
            f"{quantile_ms(watch.photographs, 0.5):.0f}",
            *(f"{quantile_ms(watch.probes, share):.1f}" for share in SHARES),
        ]
        for name, watch in watches.items()
    ]
    return markdown(head, rows)


ATTACKS = (
    IDLE, BASE, "flood of pages", "flood of photographs", "photographs of 12 MP", "progressive, 12 MP",
    "lists of 8 of 12 MP", "files that are not images", "forms of 11 that are not images",
    "brackets in JSON", "no HTTP", "slow bodies", "unread answers",
    "connections without a request", LEAVING,
)  # fmt: skip


def measure(
    bundle: Path, folder: Path, names: Sequence[str], options: argparse.Namespace
) -> dict[str, Watch]:
    """Start the server, and watch it beside each of the attacks *names*, one after the other."""
    photographs = sorted((folder / "500 x 375").iterdir())
    requests = [
        build_request("/v1/classify", "image/jpeg", one.read_bytes()) for one in photographs
    ]
    arguments = [str(bundle), "--set", "threads=1", "--set", f"front_ends={options.front_ends}"]
    watches = {}
    with serving(*arguments) as (_, url):
        expected = {one: read_classes(asyncio.run(ask(url, one))[1]) for one in requests}
        for name in names:
            with attacking(name, url, folder):
                watches[name] = asyncio.run(watch_server(url, options.seconds, expected))
            print(name, dict(watches[name].answers), file=sys.stderr, flush=True)
            time.sleep(3)  # the server ends what it works on
    return watches


def main() -> int:
    """Run from the command line; return 1 if an answer was wrong or a probe failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="of each attack")
    parser.add_argument("--front-ends", type=int, default=0, help="processes that serve HTTP")
    parser.add_argument(
        "--only", action="append", choices=ATTACKS, help="these attacks; default: all"
    )
    for internal in ("--attack", "--url", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack is not None:
        asyncio.run(attack(options.attack, options.url, Path(options.folder)))
        return 0

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        for kind in ("500 x 375", "12 MP", "12 MP, progressive"):
            write_images(folder / kind, 3, KINDS[kind])
        bundle = digits_bundle(Path(name), seed=0)
        watches = measure(bundle, folder, options.only or ATTACKS, options)

    if options.json:
        report(list(list_results(watches)), as_json=True, seconds=options.seconds)
    else:
        print(format_table(watches))
    return int(
        any(one.answers["wrong"] or one.answers["probe failed"] for one in watches.values())
    )


if __name__ == "__main__":
    sys.exit(main())
