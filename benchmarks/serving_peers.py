"""Start other servers for `benchmarks/serving.py` from a folder of small scripts outside this project.

Each script reads PEER_ONNX, PEER_PORT, PEER_MAX_BATCH, PEER_DELAY_MS, PEER_THREADS and
PEER_FAKE ("20,10" for a simulated accelerator) and classifies an image. All use the same
decoder and runtime.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Peer:
    """Command of a server, its paths, whether it requires a form, and a further header of every request."""

    command: tuple[str, ...]
    path: str
    health: str
    form: bool
    header: str = ""


PEERS = {
    "litserve": Peer(("serve_litserve.py",), "/predict", "/health", form=True),
    "bentoml": Peer(
        (
            "-m",
            "bentoml",
            "serve",
            "serve_bentoml:Svc",
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
        ),
        "/predict",
        "/readyz",
        form=True,
    ),
    "mosec": Peer(("serve_mosec.py",), "/inference", "/", form=False),
    "triton": Peer(
        ("serve_triton.py",),
        "/v2/models/classify/infer",
        "/v2/health/ready",
        form=False,
        header="Inference-Header-Content-Length: 0",
    ),
    "ray": Peer(("serve_ray.py",), "/predict", "/health", form=False),
    "fastapi_naive": Peer(("serve_fastapi_naive.py",), "/predict", "/health", form=True),
}
OURS = Peer((), "/v1/classify", "/readyz", form=False)


@contextmanager
def started(
    command: list[str], peer: Peer, port: int, environment: dict[str, str], folder: Path
) -> Iterator[int]:
    """Start a server and wait until it is healthy; yield its process id; stop it with its children."""
    child = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment, "PEER_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}{peer.health}", child)
        yield child.pid
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, stop)
                child.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def wait_for(url: str, child: subprocess.Popen[bytes]) -> None:
    """Wait until *url* responds with 200."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{url}: the server did not start")


def peer_command(python: str, peer: Peer, port: int) -> list[str]:
    """Build the command line of *peer*."""
    return [python, *(part.format(port=port) for part in peer.command)]


def free_port() -> int:
    """Find a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cpu_seconds(process: int) -> float:
    """Read the CPU seconds of *process* and its descendants from /proc; 0 on other systems than Linux.

    Those of descendants that have ended are in the accounts of the process that waited for
    them.
    """
    if not sys.platform.startswith("linux"):
        return 0.0
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    total, pending = 0, [process]
    while pending:
        process = pending.pop()
        total += ticks.get(process, 0)
        pending += children.get(process, [])
    return total / os.sysconf("SC_CLK_TCK")
