"""A Ray of one test's own, and clients that never pause; nothing here imports Ray."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.ports import held_port
from tests.service.children import line_of

STARTED = re.compile(r"ray start --address='([^']+)'")  # it says how other machines join
REPLICA = "ray::ServeReplica"
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Cluster:
    """The processes of one Ray, and the environment in which its programs find it."""

    head: subprocess.Popen[str]
    environment: dict[str, str]
    numbers_port: int

    def run(self, *command: str) -> None:
        """Run a Python module of the command line and wait for its end."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas."""
        return sorted(pid for pid, line in below(self.head.pid).items() if line.startswith(REPLICA))

    def numbers(self, name: str) -> dict[str, float]:
        """Return the metric *name* of each replica, summed over its labels, as Prometheus would read it."""
        page = httpx.get(f"http://127.0.0.1:{self.numbers_port}/metrics", timeout=10).text
        found: dict[str, float] = {}
        for labels, value in re.findall(rf"^{name}{{(.*?)}} (\S+)$", page, re.MULTILINE):
            replica = re.search(r'replica="(\w+)"', labels)
            assert replica is not None, labels
            found[replica[1]] = found.get(replica[1], 0.0) + float(value)
        return found


def below(process: int) -> dict[int, str]:
    """Return the command lines of the living descendants of *process* by their ids (Linux)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found: dict[int, str] = {}
    waiting = [process]
    while waiting:
        one = waiting.pop()
        children = [child for child, parent in parents.items() if parent == one]
        waiting += children
        for child in children:
            try:
                found[child] = (Path("/proc") / str(child) / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


@contextmanager
def own_cluster() -> Iterator[Cluster]:
    """Start a Ray without dashboard on free ports; end all of it.

    Ray gives its own processes half a minute to start, which is short on a busy machine: then once more.
    """
    for _ in range(ATTEMPTS):
        folder = tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True)
        with folder, started_head(Path(folder.name)) as cluster:
            if cluster is not None:
                yield cluster
                return
    raise AssertionError(f"Ray did not start, {ATTEMPTS} times")


@contextmanager
def started_head(folder: Path) -> Iterator[Cluster | None]:
    """Start Ray's processes with their files in *folder*, whose name must be short; None where it fails."""
    with held_port() as port, held_port() as numbers_port, ray_on(folder, port, numbers_port) as cluster:
        yield cluster


@contextmanager
def ray_on(folder: Path, port: int, numbers_port: int) -> Iterator[Cluster | None]:
    """Start Ray's processes on these ports; end all of them."""
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_AUTH_MODE": "disabled",  # its token would be written into the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
    }
    options = f"--head --block --port={port} --num-cpus=4 --num-gpus=0 --include-dashboard=false"
    options += f" --metrics-export-port={numbers_port} --temp-dir={folder}"
    with subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as head:
        try:
            address = None
            while address is None and (line := line_of(head)):
                address = STARTED.search(line)
            found = None if address is None else {**environment, "RAY_ADDRESS": address[1]}
            yield None if found is None else Cluster(head, found, numbers_port)
        finally:
            end(head)


def end(head: subprocess.Popen[str]) -> None:
    """End *head* and every process below it, at once: nothing here is worth half a minute of draining."""
    for process in (head.pid, *below(head.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was sent and answered (`time.monotonic`), with what, by which weights."""

    sent: float
    done: float
    status: int
    digest: str


@dataclass(slots=True)
class Clients:
    """So many clients that each send the next picture when the one before is answered."""

    port: int
    picture: bytes
    count: int
    answers: list[Answer] = field(default_factory=list)
    waiting: int = 0  # for an answer, now
    _leaving: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask until the block ends."""
        thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()))
        thread.start()
        try:
            yield
        finally:
            self._leaving.set()
            thread.join(60)

    def latest(self) -> set[str]:
        """Return which weights gave the last answers."""
        return {answer.digest for answer in self.answers[-2 * self.count :]}

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask() for _ in range(self.count)))

    async def _ask(self) -> None:
        while not self._leaving.is_set():  # a new connection after a failure: Ray's proxy ends the one before
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
                while not self._leaving.is_set() and await self._once(client):
                    pass

    async def _once(self, client: httpx.AsyncClient) -> bool:
        sent = time.monotonic()
        self.waiting += 1
        try:
            answer = await client.post("/v1/classify", content=self.picture)
            status, digest = answer.status_code, answer.headers.get("x-model-digest", "")
        except httpx.HTTPError as problem:
            status, digest = 0, type(problem).__name__
        self.waiting -= 1
        self.answers.append(Answer(sent, time.monotonic(), status, digest))
        return status == httpx.codes.OK
