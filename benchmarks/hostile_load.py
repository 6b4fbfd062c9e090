"""Hostile images against sopdeploy: memory, and what other clients still get.

    python benchmarks/hostile_load.py BUNDLE [--limit-mb 1024] [--attack NAME --attack NAME] [--seconds 10]

Part 1 sends every file of `hostile_images.py`, one after another and twelve at a time, to the server in a
control group of --limit-mb, and counts the responses, the peak of the memory, and killed processes. Part 2
measures an ordinary load of four connections alone, and while two other connections repeat one hostile file:
the ratio of the images per second and of the median latency. Without root, part 1 runs without limit.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx
from hostile_images import hostile_images
from load import WARM_UP_SECONDS, Load, Run, put_load, requests
from measure import Result, existing, make_parser, one_line_errors, report
from memory_group import MemoryGroup, can_limit_memory, memory_group
from serving_alone import write_images
from serving_peers import OURS, Peer, free_port, started

ATTACKS = ("WebP lossless RGBA 24 MP", "JPEG 100 scans of empty blocks 6 MP", "JPEG photograph 12 MP")
CONNECTIONS, ATTACKERS, ROUNDS = 4, 2, 3
ANSWER_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server: its name, paths and command, in which `{port}` is the port."""

    name: str
    peer: Peer
    command: tuple[str, ...]
    folder: Path
    environment: dict[str, str]

    @contextmanager
    def run(self, group: MemoryGroup | None) -> Iterator[str]:
        """Start the server, in *group* if there is one; yield the URL that takes images."""
        port = free_port()
        command = [part.format(port=port) for part in self.command]
        command = group.command(command) if group else command
        with started(command, self.peer, port, self.environment, self.folder):
            yield f"http://127.0.0.1:{port}{self.peer.path}"

    def post(self, url: str, body: bytes) -> str:
        """Send *body*; return the status, or the name of the error."""
        try:
            if self.peer.form:
                files = {"file": ("a.jpg", body, "image/jpeg")}
                return str(httpx.post(url, files=files, timeout=ANSWER_SECONDS).status_code)
            response = httpx.post(url, content=body, timeout=ANSWER_SECONDS)
            if response.status_code >= 500 and "retry-after" not in response.headers:
                return f"{response.status_code} without Retry-After"
            return str(response.status_code)
        except httpx.HTTPError as error:
            return type(error).__name__


def send_all(server: Server, limit: int, files: Sequence[tuple[str, bytes]]) -> list[Result]:
    """Send *files* one after another and twelve at a time; report responses, peak and kills."""
    results = []
    for at_once in (1, 12):
        with memory_group(limit) if can_limit_memory() else nullcontext() as group:
            with server.run(group) as url, ThreadPoolExecutor(at_once) as pool:
                codes = Counter(pool.map(lambda body: server.post(url, body), [body for _, body in files]))
            case = f"{server.name}, {at_once} at a time: {dict(sorted(codes.items()))}"
            if group is not None:
                case += f", {group.kills} killed"
                peak = group.peak / 1e6
                results.append(
                    Result(case=case, against="limit", ours=peak, other=limit / 1e6, unit="MB", runs=1)
                )
            else:
                results.append(Result(case=case, ours=0.0, unit="MB", runs=1))
    return results


def attack(server: Server, name: str, body: bytes, folder: Path, seconds: float) -> list[Result]:
    """Measure an ordinary load alone and during an attack with *body*, alternately; return the medians."""
    alone: list[Load] = []
    attacked: list[Load] = []
    codes: Counter[str] = Counter()
    form = ["--form"] if server.peer.form else []
    options = ("--connections", CONNECTIONS, *form)
    with server.run(None) as url, tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as pool:
        (Path(temporary) / "hostile").write_bytes(body)
        bodies = requests(url, Path(temporary), server.peer.form)
        for _ in range(ROUNDS):
            alone.append(put_load(url, folder, seconds, *options))
            attacking = Run(url, bodies, ATTACKERS, seconds + WARM_UP_SECONDS)
            answered = pool.submit(asyncio.run, attacking.measure())
            attacked.append(put_load(url, folder, seconds, *options))
            codes += answered.result().codes
    case = f"{server.name}, two connections with {name} {dict(codes)}"
    return [
        Result(
            case=case,
            against="alone",
            ours=statistics.median(getattr(load, field) for load in attacked),
            other=statistics.median(getattr(load, field) for load in alone),
            unit=unit,
            runs=ROUNDS,
        )
        for field, unit in (("images_per_s", "images/s"), ("p50_ms", "ms p50"))
    ]


def our_server(arguments: argparse.Namespace) -> Server:
    """Describe the server that is attacked."""
    flags = ("--port", "{port}", "--threads", "1")
    command = (sys.executable, "-m", "sopdeploy", "serve", str(arguments.bundle), *flags)
    return Server("sopdeploy", OURS, command, arguments.folder or Path.cwd(), {})


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--folder", type=existing, help="checkout to serve with")
    parser.add_argument("--limit-mb", type=int, default=1024, help="MiB of the control group")
    parser.add_argument("--attack", action="append", help="name of a hostile file; can be repeated")
    parser.add_argument("--part", type=int, choices=(1, 2), help="run only this part")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    files = list(hostile_images())
    results: list[Result] = []
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder))
        server = our_server(arguments)
        if arguments.part != 2:
            results += send_all(server, arguments.limit_mb << 20, files)
        for name in (arguments.attack or ATTACKS) if arguments.part != 1 else ():
            results += attack(server, name, dict(files)[name], images, arguments.seconds)
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
