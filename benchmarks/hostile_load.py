"""Hostile images against sopdeploy: memory of the server, its responses, and processes killed for memory.

    python benchmarks/hostile_load.py BUNDLE [--limit-mb 1024]

Sends every file of `hostile_images.py`, one after another and twelve at a time, to the server in a control
group of --limit-mb, as a container has. Needs root on Linux.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from hostile_images import hostile_images
from measure import Result, existing, make_parser, one_line_errors, report
from serving_peers import OURS, free_port, started

ROOT = Path("/sys/fs/cgroup")
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}  # files by the version of control groups
PEAKS = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
KILLS = {1: "memory.oom_control", 2: "memory.events"}
ANSWER_SECONDS, END_SECONDS = 90.0, 10.0


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


def post(url: str, body: bytes) -> str:
    """Send *body*; return the status, or the name of the error."""
    try:
        response = httpx.post(url, content=body, timeout=ANSWER_SECONDS)
    except httpx.HTTPError as error:
        return type(error).__name__
    late = response.status_code >= 500 and "retry-after" not in response.headers
    return f"{response.status_code}{' without Retry-After' if late else ''}"


def send_all(bundle: Path, limit: int) -> list[Result]:
    """Send all files one after another and twelve at a time; report responses, peak and kills."""
    results, bodies = [], [body for _, body in hostile_images()]
    for at_once in (1, 12):
        with memory_group(limit) as group:
            port = free_port()
            join = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
            serve = [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--threads", "1"]
            command = ["/bin/sh", "-c", join, "sh", *serve, "--port", str(port)]
            url = f"http://127.0.0.1:{port}{OURS.path}"
            with started(command, OURS, port, {}, Path.cwd()), ThreadPoolExecutor(at_once) as pool:
                codes = Counter(pool.map(lambda body, url=url: post(url, body), bodies))
            peak = int((group / PEAKS[version()]).read_text()) / 1e6
            events = dict(line.split() for line in (group / KILLS[version()]).read_text().splitlines())
        case = f"{at_once} at a time: {dict(sorted(codes.items()))}, {events['oom_kill']} killed"
        results.append(Result(case=case, against="limit", ours=peak, other=limit / 1e6, unit="MB", runs=1))
    return results


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--limit-mb", type=int, default=1024, help="MiB of the control group")
    arguments = parser.parse_args()
    with one_line_errors():
        report(send_all(arguments.bundle, arguments.limit_mb << 20), as_json=arguments.json)


if __name__ == "__main__":
    main()
