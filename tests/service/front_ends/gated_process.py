"""An inference process whose batches wait until the file that the variable GATE names exists."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.front_ends import inference_process
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.server.launch import run_program
from sopdeploy_service.settings import Settings

# `sopdeploy serve` with such an inference process; flags follow.
SERVE = (
    "-c",
    "import sys; from sopdeploy_service.front_ends import processes; "
    "from sopdeploy.cli.app import main; "
    "processes.MODULES[processes.INFERENCE] = 'tests.service.front_ends.gated_process'; "
    "sys.argv.insert(1, 'serve'); main()",
)


class Gated:
    """The *runtime* behind the gate; the probes have run before."""

    def __init__(self, runtime: Runtime) -> None:
        self.name, self.device, self.largest_batch = runtime.name, runtime.device, runtime.largest_batch
        self._runtime, self.close = runtime, runtime.close

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        while not Path(os.environ["GATE"]).exists():
            time.sleep(0.01)
        return self._runtime.run(images)


def load_gated(path: Path, settings: Settings, checked: Bundle | None) -> LoadedModel:
    loaded = load_model(path, settings, checked)
    return replace(loaded, runtime=Gated(loaded.runtime))


if __name__ == "__main__":
    inference_process.load_model = load_gated
    code = run_program(inference_process.run_inference_process)
    sys.stdout.flush()
    os._exit(code)
