"""`sopdeploy serve` with several processes and simulated runtimes: constant pixels, batches that sleep.

    with running({"devices": "cpu,cpu"}, "20,2,8") as server: ...

The string "20,2,8" means: a batch of n images takes 20 + 2 n ms, and a batch has at most 8 images. Images
are not decoded unless SIMULATED_DECODING is `real`; JPEGs are then decoded at the scale of the rules. If
SIMULATED_SAMPLES is set, each process writes the counts of `serving_stages.Sampler` to this folder.
The supervisor starts this module as the template of all processes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import httpx
from serving_ours import fake_model, skip_decoding

from sopdeploy_service.devices import device_server
from sopdeploy_service.devices.processes import LaunchConfig
from sopdeploy_service.devices.template import wait_for_launch
from sopdeploy_service.observability.pages import SHARED_SECONDS
from sopdeploy_service.server import process

HERE = Path(__file__).resolve().parent
BATCH_VARIABLE = "SIMULATED_BATCH"
SUPERVISOR = """
import sys, json
from sopdeploy_service.devices import supervisor, template
from sopdeploy_service.settings import load_settings
template.MODULE = "simulated_server"
sys.exit(supervisor.run_supervisor(["model=simulated"], load_settings(**json.loads(sys.argv[1]))))
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its supervisor and its URL."""

    child: "subprocess.Popen[str]"
    url: str

    def samples(self, metric: str) -> dict[str, float]:
        """Sum the samples of *metric* by process, when all that has ended is on the page."""
        sums: dict[str, float] = {}
        time.sleep(2 * SHARED_SECONDS)
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            match = re.match(rf"{metric}{{.*\bprocess=\"([^\"]+)\".*}} (\S+)", line)
            if match is not None:
                sums[match[1]] = sums.get(match[1], 0.0) + float(match[2])
        return sums


@contextmanager
def running(settings: dict[str, Any], batch: str) -> Iterator[Server]:
    """Start a server with *settings* and wait until it is ready; stop it at the end."""
    paths = [str(HERE), *sys.path]
    given = {"port": 0, **settings}
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, json.dumps(given)],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            BATCH_VARIABLE: batch,
            "PYTHONPATH": os.pathsep.join(paths),
        },
    ) as child:
        try:
            ready = cast(TextIO, child.stdout).readline().split()
            if not ready:
                raise SystemExit("the server did not start")
            yield Server(child, ready[1])
            child.send_signal(signal.SIGTERM)
            child.wait(30)
        finally:
            child.kill()


def main() -> int:
    """Run the process that the supervisor has described."""
    fixed, each, largest = map(float, os.environ[BATCH_VARIABLE].split(","))
    model = fake_model(fixed, each, int(largest), "scaled")
    process.find_bundles = lambda *_: {"model": model.bundle}  # type: ignore[attr-defined]
    process.load_bundle = lambda *_: model  # type: ignore[attr-defined]
    if os.environ.get("SIMULATED_DECODING") != "real":
        skip_decoding()
    samples = os.environ.get("SIMULATED_SAMPLES")
    if samples is None:
        return device_server.main()
    from serving_stages import Sampler  # noqa: PLC0415 - which imports this module

    samplers: list[Sampler] = []

    def launch_and_sample() -> LaunchConfig:
        config = wait_for_launch()
        samplers.append(Sampler(Path(samples)))  # a fork stops the timer
        return config

    device_server.wait_for_launch = launch_and_sample  # type: ignore[attr-defined]
    code = device_server.main()
    samplers[0].write()
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
