"""An engine process whose batches wait until the file that the variable GATE names exists."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.inference.engine_process import main
from sopdeploy_service.runtime.base import Runtime

# `sopdeploy serve` with such an engine process; flags follow.
SERVE = (
    "-c",
    "import sys; from sopdeploy_service.server import workers; from sopdeploy.cli.app import main; "
    "workers.ENGINE = 'tests.service.server.gated_engine'; sys.argv.insert(1, 'serve'); main()",
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


if __name__ == "__main__":
    main.faults_from_environment = lambda: SimpleNamespace(wrap_runtime=Gated)
    code = main.main()
    sys.stdout.flush()
    os._exit(code)
