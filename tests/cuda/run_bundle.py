"""Run three images with the CUDA provider on the stand-in, while one function of CUDA fails.

python -m tests.cuda.run_bundle BUNDLE FUNCTION CODE WHEN, where WHEN is "open" or "run". Prints type and
message of the error as JSON.
"""

import ctypes
import json
import sys
from pathlib import Path

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.runtime.base import classify_error
from sopdeploy_service.runtime.onnxruntime import CudaOnnxRuntime
from tests.cuda.stand_in import runtime_library
from tests.tensorrt.networks import some_images


def fail(function: str, code: int) -> None:
    """Let the next calls of *function* return *code*."""
    ctypes.CDLL(runtime_library()).stand_in_fail(function.encode(), code)


def main(folder: str, function: str, code: str, when: str) -> None:
    bundle = open_bundle(Path(folder))
    answer = ["", ""]
    try:
        if when == "open":
            fail(function, int(code))
        runtime = CudaOnnxRuntime(bundle)
        fail(function, int(code))
        runtime.run(some_images())
    except Exception as error:
        failure = classify_error(error) or error
        answer = [type(failure).__name__, str(failure)]
    sys.stdout.write(json.dumps(answer))


main(*sys.argv[1:])
