"""Open graphs with the CUDA provider on the stand-in: precision and path per line, one answer per line."""

import json
import sys

import onnxruntime

from sopdeploy_service.runtime.cuda_libraries import load_cuda_libraries
from sopdeploy_service.runtime.onnxruntime import CUDA, cuda_options, operators_on_cpu, session_options

load_cuda_libraries(onnxruntime)
for line in sys.stdin:
    precision, _, path = line.strip().partition(" ")
    try:
        session = onnxruntime.InferenceSession(
            path,
            session_options(onnxruntime, 1, CUDA),
            providers=[(CUDA, cuda_options(precision))],
            enable_fallback=0,
        )
        answer = ", ".join(operators_on_cpu(session)) or "ok"
    except Exception as error:  # the library's errors share no base class
        answer = " ".join(str(error).split())
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
