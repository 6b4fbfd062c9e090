"""Hostile images and requests against sopdeploy: memory, responses, processes killed for memory, latency.

    python benchmarks/hostile_load.py BUNDLE [--limit-mb 1024] [--part images|requests]

Sends every file of `hostile_images.py`, one after another and twelve at a time, to the server in a control
group of --limit-mb, as a container has. Then eight connections send the costliest requests of all endpoints
while `/livez` is asked ten times a second. Needs root on Linux.
"""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from hostile_images import hostile_images
from measure import Result, existing, make_parser, one_line_errors, report
from serving_peers import OURS, free_port, started

ROOT = Path("/sys/fs/cgroup")
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}  # files by the version of control groups
PEAKS = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
KILLS = {1: "memory.oom_control", 2: "memory.events"}
ANSWER_SECONDS, END_SECONDS = 90.0, 10.0
CONNECTIONS, LOAD_SECONDS, PROBE_SECONDS = 8, 20.0, 0.1
CLIENT = httpx.Client(timeout=ANSWER_SECONDS)  # a new one would read certificates for tens of milliseconds
JSON_BYTES, BODY_BYTES = 15_900_000, 19_900_000  # just below the limits


def version() -> int:
    """Return the version of the control groups of this machine."""
    return 1 if (ROOT / "memory").is_dir() else 2


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Create a control group of at most *limit* bytes; raises `OSError` where this is not possible."""
    folder = (ROOT / "memory" if version() == 1 else ROOT) / f"sopdeploy-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / LIMITS[version()]).write_text(str(limit))
        yield folder
    finally:
        end = time.monotonic() + END_SECONDS  # child processes end after a server that was killed
        while (folder / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        folder.rmdir()


def can_limit_memory() -> bool:
    """Whether this process may create a group with a limit."""
    try:
        with memory_group(1 << 30):
            return True
    except OSError:
        return False


class Request(NamedTuple):
    """A request that makes as much work as its endpoint allows."""

    path: str
    body: bytes
    headers: dict[str, str | bytes]


def filled(unit: bytes, size: int, first: bytes, last: bytes) -> bytes:
    """Put as many copies of *unit* between *first* and *last* as fit into *size* bytes."""
    return first + unit * ((size - len(first) - len(last)) // len(unit)) + last


def costly_requests(url: str) -> list[Request]:
    """Return the costliest requests to the server at *url*, legal and illegal ones."""
    name = httpx.get(f"{url}/info").json()["models"][0]["name"]
    pixels = httpx.get(f"{url}/v2/models/{name}").json()["inputs"][0]
    size = pixels["shape"][1:]
    head = b'{"inputs":[{"name":"%b","datatype":"FP32","shape":[%d,%b],"data":['
    shape = ",".join(map(str, size)).encode()

    def tensor(images: int, data: bytes) -> bytes:
        return head % (pixels["name"].encode(), images, shape) + data + b"]}]}"

    images = min(64, JSON_BYTES // (4 * prod(size)))
    zeros, levels = partial(filled, b"0,"), b"[" * 200 + b"]" * 200 + b","
    infer = [
        tensor(images, b"255," * (images * prod(size) - 1) + b"255"),  # a legal one
        tensor(1, b'"%b"' % (b"a" * 1_000_000) + b',"b"' * (prod(size) - 1)),
        tensor(1, zeros(JSON_BYTES - 1000, b"", b"0")),
        zeros(JSON_BYTES, b'{"inputs":[', b"0]}"),
        zeros(2_000_000, b'{"inputs":[', b"0]}"),
        filled(b"1.5,", JSON_BYTES, b'{"inputs":[{"name":"x","datatype":"x","data":0,"shape":[', b"0]}]}"),
        filled(b"[],", 3_000_000, b'{"inputs":[],"x":[', b"[]]}"),
        filled(levels, 2_000_000, b'{"inputs":[],"x":[', b"0]}"),
        b'{"inputs":[],"x":%b1%b}' % (b"[" * 1023, b"]" * 1023),
        filled(b"\\\\", JSON_BYTES, b'{"inputs":[],"id":"', b'"}'),
        filled(b"1", JSON_BYTES, b'{"inputs":[],"id":', b"}"),
    ]
    classify = [
        zeros(JSON_BYTES, b'{"images":[', b"0]}"),
        filled(b"0.5,", 4_000_000, b'{"images":[', b"0]}"),
        filled(b"A", JSON_BYTES, b'{"image":"', b'$"}'),
        b'{"images":[],"x":%b%b}' % (b"[" * 1000, b"]" * 1000),
    ]
    json: dict[str, str | bytes] = {"content-type": "application/json"}
    form: dict[str, str | bytes] = {"content-type": "multipart/form-data; boundary=X"}
    part = b'--X\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
    names = ("\xe9." * 15_000).encode("latin-1")
    return [
        *(Request(f"/v2/models/{name}/infer", body, json) for body in infer),
        *(Request("/v1/classify", body, json) for body in classify),
        Request("/v1/classify", filled(b"\r\n--", BODY_BYTES, part, b"\r\n--X--\r\n"), form),
        Request("/v1/classify", filled(part + b"x\r\n", BODY_BYTES, b"", b"--X--\r\n"), form),
        Request("/v1/classify", b"", {"host": names}),
        Request("/v1/classify", b"", {"origin": b"https://" + names}),
        Request("/v1/classify?" + "a&" * 3900, b"", {}),
        Request(f"/v2/models/{'a' * 7900}/infer", b"{}", json),
    ]


def post(url: str, body: bytes, headers: dict[str, str | bytes] | None = None) -> str:
    """Send *body*; return the status, or the name of the error."""
    try:
        given = [(key, value) for key, value in (headers or {}).items()]
        response = CLIENT.post(url, content=body, headers=given)  # type: ignore[arg-type]
    except httpx.HTTPError as error:
        return type(error).__name__
    late = response.status_code >= 500 and "retry-after" not in response.headers
    return f"{response.status_code}{' without Retry-After' if late else ''}"


class Group(NamedTuple):
    """A server in a control group."""

    url: str
    folder: Path

    def peak(self) -> float:
        """Return the most memory that the group has used, in MB."""
        return int((self.folder / PEAKS[version()]).read_text()) / 1e6

    def kills(self) -> str:
        """Return how many of its processes were killed for memory."""
        events = dict(line.split() for line in (self.folder / KILLS[version()]).read_text().splitlines())
        return events["oom_kill"]


@contextmanager
def serving_in_group(bundle: Path, limit: int) -> Iterator[Group]:
    """Serve *bundle* in a control group of at most *limit* bytes."""
    with memory_group(limit) as group:
        port = free_port()
        join = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        serve = [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--threads", "1"]
        command = ["/bin/sh", "-c", join, "sh", *serve, "--port", str(port)]
        with started(command, OURS, port, {}, Path.cwd()):
            yield Group(f"http://127.0.0.1:{port}", group)


def send_images(bundle: Path, limit: int) -> list[Result]:
    """Send all files one after another and twelve at a time; report responses, peak and kills."""
    results, bodies = [], [body for _, body in hostile_images()]
    for at_once in (1, 12):
        with serving_in_group(bundle, limit) as server, ThreadPoolExecutor(at_once) as pool:
            codes = Counter(pool.map(partial(post, f"{server.url}{OURS.path}"), bodies))
            case = f"{at_once} at a time: {dict(sorted(codes.items()))}, {server.kills()} killed"
            peak = server.peak()
        results.append(Result(case=case, against="limit", ours=peak, other=limit / 1e6, unit="MB", runs=1))
    return results


def send_requests(bundle: Path, limit: int) -> list[Result]:
    """Send the costliest requests from several connections; report responses, peak, kills and `/livez`."""
    with serving_in_group(bundle, limit) as server, ThreadPoolExecutor(CONNECTIONS) as pool:
        requests = costly_requests(server.url)
        end = time.monotonic() + LOAD_SECONDS

        def send(first: int) -> Counter[str]:
            codes: Counter[str] = Counter()
            for path, body, headers in islice(cycle(requests), first, None):
                if time.monotonic() >= end:
                    return codes
                codes[post(f"{server.url}{path}", body, headers)] += 1
            return codes

        step = len(requests) / CONNECTIONS
        sent = [pool.submit(send, round(number * step)) for number in range(CONNECTIONS)]
        seconds: list[float] = []
        while time.monotonic() < end:
            began = time.monotonic()
            CLIENT.get(f"{server.url}/livez")
            seconds.append(time.monotonic() - began)
            time.sleep(PROBE_SECONDS)
        codes = sum((one.result() for one in sent), Counter())
        case = f"costly requests: {dict(sorted(codes.items()))}, {server.kills()} killed"
        peak = server.peak()
    shared: dict[str, Any] = {"runs": len(seconds), "unit": "ms", "against": "goal"}
    return [
        Result(case=case, against="limit", ours=peak, other=limit / 1e6, unit="MB", runs=1),
        Result(case="/livez meanwhile, median", ours=1e3 * statistics.median(seconds), other=50.0, **shared),
        Result(case="/livez meanwhile, slowest", ours=1e3 * max(seconds), other=None, **shared),
    ]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--limit-mb", type=int, default=1024, help="MiB of the control group")
    parser.add_argument("--part", choices=["images", "requests"], help="by default both")
    arguments = parser.parse_args()
    parts = {"images": send_images, "requests": send_requests}
    chosen = [arguments.part] if arguments.part else list(parts)
    with one_line_errors():
        results = [row for part in chosen for row in parts[part](arguments.bundle, arguments.limit_mb << 20)]
        report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
