"""`sopdeploy serve` with several processes and simulated runtimes: constant pixels, batches that sleep.

    with running({"devices": "cpu,cpu"}, "20,2,8") as server: ...

The string "20,2,8" means: a batch of n images takes 20 + 2 n ms, and a batch has at most 8 images. The
supervisor starts this module for each worker and engine process, with its order in SOPDEPLOY_WORKER.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import httpx
from serving_ours import fake_model, replace_decoder
from soak_accounts import children_of

from sopdeploy_service.inference.engine_process import main as engine
from sopdeploy_service.inference.engine_process.models import EngineModel
from sopdeploy_service.server import process

HERE = Path(__file__).resolve().parent
BATCH_VARIABLE = "SIMULATED_BATCH"
SUPERVISOR = """
import sys, json
from sopdeploy_service.server import process, workers
from sopdeploy_service.settings import load_settings
workers.SERVER = workers.ENGINE = "simulated_server"
workers.STABLE_SECONDS = 0.0  # restart without delay, however often a process dies
sys.exit(process.serve(["model=simulated"], load_settings(**json.loads(sys.argv[1]))))
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its supervisor, its URL and that of its health port."""

    child: "subprocess.Popen[str]"
    url: str
    health: str

    def processes(self, *, engines: bool = False) -> list[int]:
        """List the processes that serve HTTP, or the engine processes."""
        return [child for child in children_of(self.child.pid) if is_engine(child) == engines]

    def samples(self, metric: str, label: str) -> dict[str, float]:
        """Sum the samples of *metric* by *label*, from the health port."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.health}/metrics", timeout=30).text.splitlines():
            match = re.match(rf"{metric}{{.*\b{label}=\"([^\"]+)\".*}} (\S+)", line)
            if match is not None:
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found


def is_engine(process: int) -> bool | None:
    """Check whether *process* is an engine process; None if it is no worker or has ended."""
    try:
        order = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return None
    return b'"listener"' not in order if b"SOPDEPLOY_WORKER" in order else None


@contextmanager
def running(settings: dict[str, Any], batch: str) -> Iterator[Server]:
    """Start a server with *settings* and wait until it is ready; stop it at the end."""
    paths = [str(HERE), *sys.path]
    given = {"port": 0, "health_port": 0, **settings}
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, json.dumps(given)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, BATCH_VARIABLE: batch, "PYTHONPATH": os.pathsep.join(paths)},
    ) as child:
        try:
            lines = [cast(TextIO, child.stdout).readline().split() for _ in range(2)]
            if not lines[1]:
                raise SystemExit("the server did not start")
            yield Server(child, lines[1][1], lines[0][1])
            child.send_signal(signal.SIGTERM)
            child.wait(30)
        finally:
            child.kill()


def main() -> int:
    """Run the process that the supervisor's order describes."""
    fixed, each, largest = map(float, os.environ[BATCH_VARIABLE].split(","))
    model = fake_model(fixed, each, int(largest))
    if "listener" in json.loads(os.environ["SOPDEPLOY_WORKER"]):
        replace_decoder()
        process.load_model = lambda *_: model  # type: ignore[attr-defined]
        return process.main()

    def table(_: Sequence[str], settings: Any, __: object) -> Any:
        served = {"model": [EngineModel("model", 1, model, settings)]}
        return SimpleNamespace(models=lambda: served)

    engine.ModelTable = table  # type: ignore[assignment,attr-defined]
    return engine.main()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
