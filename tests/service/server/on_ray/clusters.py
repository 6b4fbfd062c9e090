"""A Ray cluster for one test, and clients that send without pause; Ray is not imported."""

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
from tests.service.children import below, line_of

STARTED = re.compile(r"ray start --address='([^']+)'")  # printed by `ray start`
REPLICA = "ray::ServeReplica"
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Cluster:
    """The processes of a Ray cluster and the environment that connects to it."""

    head: subprocess.Popen[str]
    environment: dict[str, str]
    numbers_port: int

    def run(self, *command: str) -> None:
        """Run a Python module as a command and wait for it."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def replicas(self) -> list[int]:
        """List the process IDs of the replicas."""
        return sorted(pid for pid, line in below(self.head.pid).items() if line.startswith(REPLICA))

    def numbers(self, name: str) -> dict[str, float]:
        """Read the metric *name* of each replica, summed over its labels."""
        page = httpx.get(f"http://127.0.0.1:{self.numbers_port}/metrics", timeout=10).text
        found: dict[str, float] = {}
        for labels, value in re.findall(rf"^{name}{{(.*?)}} (\S+)$", page, re.MULTILINE):
            replica = re.search(r'replica="(\w+)"', labels)
            assert replica is not None, labels
            found[replica[1]] = found.get(replica[1], 0.0) + float(value)
        return found


@contextmanager
def own_cluster() -> Iterator[Cluster]:
    """Start a Ray cluster without dashboard on free ports, and stop it in the end.

    Ray's startup timeout of half a minute is short on a busy machine, so the start is retried once.
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
    """Start Ray's processes with their files in *folder* (a short path); None on failure."""
    with held_port() as port, held_port() as numbers_port, ray_on(folder, port, numbers_port) as cluster:
        yield cluster


@contextmanager
def ray_on(folder: Path, port: int, numbers_port: int) -> Iterator[Cluster | None]:
    """Start Ray's processes on these ports and stop them in the end."""
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_AUTH_MODE": "disabled",  # otherwise Ray writes a token to the home directory
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
    """Kill *head* and its descendants; draining would take half a minute."""
    for process in (head.pid, *below(head.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Response:
    """One request: times (`time.monotonic`), status and model digest."""

    sent: float
    done: float
    status: int
    digest: str


@dataclass(slots=True)
class Clients:
    """Clients that each send the next image after the previous response."""

    port: int
    image: bytes
    count: int
    responses: list[Response] = field(default_factory=list)
    waiting: int = 0  # requests in flight
    _leaving: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send requests until the block ends."""
        thread = threading.Thread(target=lambda: asyncio.run(self._send_all()))
        thread.start()
        try:
            yield
        finally:
            self._leaving.set()
            thread.join(60)

    def latest(self) -> set[str]:
        """Model digests of the latest responses."""
        return {response.digest for response in self.responses[-2 * self.count :]}

    async def _send_all(self) -> None:
        await asyncio.gather(*(self._send() for _ in range(self.count)))

    async def _send(self) -> None:
        while not self._leaving.is_set():  # reconnect after a failure: Ray's proxy closes the connection
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
                while not self._leaving.is_set() and await self._once(client):
                    pass

    async def _once(self, client: httpx.AsyncClient) -> bool:
        sent = time.monotonic()
        self.waiting += 1
        try:
            response = await client.post("/v1/classify", content=self.image)
            status, digest = response.status_code, response.headers.get("x-model-digest", "")
        except httpx.HTTPError as problem:
            status, digest = 0, type(problem).__name__
        self.waiting -= 1
        self.responses.append(Response(sent, time.monotonic(), status, digest))
        return status == httpx.codes.OK
