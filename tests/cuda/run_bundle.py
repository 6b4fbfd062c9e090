"""Run three images with the CUDA provider on the stand-in, while one function of CUDA fails.

python -m tests.cuda.run_bundle BUNDLE FUNCTION CODE WHEN, where WHEN is "open" or "run". Prints type and
message of the error, and the bytes of the images that were copied from pageable memory, as JSON.
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


def main(folder: str, function: str, code: str, when: str) -> None:
    bundle, cudart = open_bundle(Path(folder)), ctypes.CDLL(runtime_library())
    answer, before = ["", ""], 0
    try:
        if when == "open":
            cudart.stand_in_fail(function.encode(), int(code))
        runtime = CudaOnnxRuntime(bundle)
        before = cudart.stand_in_pageable_bytes()  # of the weights
        cudart.stand_in_fail(function.encode(), int(code))
        runtime.run(some_images())
    except Exception as error:
        failure = (classify_error(error) if when == "run" else None) or error
        answer = [type(failure).__name__, str(failure)]
    copied = cudart.stand_in_pageable_bytes() - before if when == "run" else 0
    sys.stdout.write(json.dumps([*answer, copied]))


main(*sys.argv[1:])
