"""Build the program of a bundle from its checkpoint with torch-tensorrt, without a GPU; prints JSON.

torch-tensorrt on TensorRT-RTX converts and builds without a device, but asks torch for one and
loads the plan at the end. Both are replaced here.
"""

import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_commands.engine_builder.from_program import build_from_program
from sopdeploy_export.export_checkpoint import rebuild_program
from sopdeploy_service.runtime.tensorrt_cache import Profile

DEVICE: dict[str, Any] = {
    "current_device": lambda: 0,
    "device": lambda *_: nullcontext(),
    "empty_cache": lambda: None,
    "get_device_capability": lambda *_: (8, 9),
    "get_device_name": lambda *_: "none",
    "mem_get_info": lambda *_: (60 << 30, 80 << 30),
    "set_device": lambda _: None,
    "synchronize": lambda *_: None,
}


class Plan:
    """An engine that is not loaded."""

    def __init__(self, content: Any) -> None:
        self.serialize = lambda: bytes(content)

    def get_aliased_input_tensor(self, _name: str) -> None:
        """Name no input: no output shares memory with one."""


class Runtime:
    def __init__(self, _logger: object) -> None:
        self.deserialize_cuda_engine = Plan


def main(path: str, checkpoint: str) -> None:
    for name, function in DEVICE.items():
        setattr(torch.cuda, name, function)
    import torch_tensorrt
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter as interpreter

    interpreter.trt.Runtime = Runtime
    names: list[str] = []
    mark = interpreter.TRTInterpreter.__init__

    def record_names(self: Any, *args: Any, **kwargs: Any) -> None:
        mark(self, *args, **kwargs)
        names.extend([*kwargs["input_binding_names"], *kwargs["output_binding_names"]])

    interpreter.TRTInterpreter.__init__ = record_names
    convert = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
    # Builds in less time
    torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine = partial(
        convert, optimization_level=0
    )
    profile = Profile(minimum=1, maximum=4)
    bundle = open_bundle(Path(path))
    read_program = partial(rebuild_program, Path(checkpoint), bundle.manifest)
    plan = build_from_program(bundle, read_program, profile, workspace=1 << 30)
    print(json.dumps({"bytes": len(plan), "tensors": names}))  # noqa: T201


main(*sys.argv[1:])
