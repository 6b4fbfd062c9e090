"""The process of a device whose batches wait until the file that the variable GATE names exists."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.devices.device_server import main
from sopdeploy_service.inference import model_worker
from sopdeploy_service.inference.loader import LoadedModel, load_bundle
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.server import process
from sopdeploy_service.settings import Settings

# `sopdeploy serve` with such processes; flags follow.
SERVE = (
    "-c",
    "import sys; from sopdeploy_service.devices import template; "
    "from sopdeploy_commands.app import main; "
    "template.MODULE = 'tests.service.devices.gated_device'; "
    "sys.argv.insert(1, 'serve'); main()",
)


class Gated:
    """The *runtime* behind the gate; the probes have run before."""

    def __init__(self, runtime: Runtime) -> None:
        self.name = runtime.name
        self.device = runtime.device
        self.largest_batch = runtime.largest_batch
        self._runtime = runtime
        self.close = runtime.close

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        while not Path(os.environ["GATE"]).exists():
            time.sleep(0.01)
        return self._runtime.run(images)


def load_gated(bundle: Bundle, settings: Settings) -> LoadedModel:
    loaded = load_bundle(bundle, settings)
    return replace(loaded, runtime=Gated(loaded.runtime))


if __name__ == "__main__":
    process.load_bundle = load_gated
    model_worker.MIN_HANG_SECONDS = 60.0
    sys.exit(main())
