"""Open graphs with the CUDA provider on the stand-in: precision and path per line, one answer per line.

An answer lists the operators on the CPU, and the copies between GPU and CPU that ONNX Runtime
adds, which only its optimized graph contains; "ok" if there are none.
"""

import json
import sys
from collections import Counter

import onnx
import onnxruntime

from sopdeploy_service.runtime.cuda_libraries import load_cuda_libraries
from sopdeploy_service.runtime.onnxruntime import (
    CUDA,
    open_graph,
    operators_on_cpu,
    session_options,
)

load_cuda_libraries(onnxruntime)
for line in sys.stdin:
    precision, _, path = line.strip().partition(" ")
    options = session_options(onnxruntime, 1, CUDA)
    options.optimized_model_filepath = f"{path}.optimized"
    try:
        session = open_graph(onnxruntime, path, options, CUDA, precision)
        optimized = onnx.load(options.optimized_model_filepath).graph
        copies = Counter(
            node.op_type for node in optimized.node if node.op_type.startswith("Memcpy")
        )
        found = [
            *operators_on_cpu(session),
            *(f"{copies[name]} {name}" for name in sorted(copies)),
        ]
        answer = ", ".join(found) or "ok"
    except Exception as error:  # the library's errors share no base class
        answer = " ".join(str(error).split())
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
