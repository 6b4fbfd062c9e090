"""Run three images with the CUDA provider on the stand-in, while one function of CUDA fails.

python -m tests.cuda.run_bundle BUNDLE FUNCTION CODE WHEN, where WHEN is "open" or "run". Prints type and
message of the error as JSON.
"""

import ctypes
import json
import sys
from pathlib import Path

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.runtime.base import reason_of
from sopdeploy_service.runtime.onnxruntime import CudaOnnxRuntime
from tests.cuda.stand_in import runtime_library
from tests.tensorrt.networks import some_images


def main(folder: str, function: str, code: str, when: str) -> None:
    bundle, cudart = open_bundle(Path(folder)), ctypes.CDLL(runtime_library())
    answer = ["", ""]
    try:
        if when == "open":
            cudart.stand_in_fail(function.encode(), int(code))
        runtime = CudaOnnxRuntime(bundle)
        cudart.stand_in_fail(function.encode(), int(code))
        runtime.run(some_images())
    except Exception as error:
        answer = [type(error).__name__, reason_of(error) if when == "run" else str(error)]
    sys.stdout.write(json.dumps(answer))


main(*sys.argv[1:])
