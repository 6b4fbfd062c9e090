"""Exported graphs as GPU runtimes receive them, checked without a GPU, and the matrix of what was checked.

TensorRT: our lint, parser call and strongly typed build with TensorRT-RTX, a sibling of TensorRT whose
builder needs no driver. It proves that a graph parses, is typed correctly and builds; not tactics or numbers.
ONNX Runtime on CUDA: every operator has a CUDA kernel for its type, because our session forbids the CPU.
"""

import functools
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from sopdeploy.tensorrt.profiles import Profile
from sopdeploy_export.tensorrt.build import BuildRequest, build
from sopdeploy_export.tensorrt.lint import check_precision, lint
from sopdeploy_export.tensorrt.rewrites import value_types

PROPERTY = "gpu graph"
PRECISIONS = ("fp32", "fp16", "bf16-backbone", "int8")
KERNELS = json.loads((Path(__file__).parent / "tensorrt" / "cuda_kernels.json").read_text())
ABSENT = "tensorrt-rtx-cu13 is not installed (it exists for Linux on x86-64)"
Record = Callable[[str, object], None]


class RealTensorRT(ModuleType):
    """TensorRT-RTX in the place of TensorRT 11; its builder compiles for a GPU that is not here."""

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self._rtx = rtx = importlib.import_module("tensorrt_rtx")
        self.__version__ = "11.0.0"

        class Builder(rtx.Builder):
            def create_builder_config(self) -> Any:
                config = super().create_builder_config()
                config.num_compute_capabilities = 1
                assert config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
                return config

            def __del__(self) -> None:
                """Replace the one of TensorRT, which only warns that it is deprecated."""

        self.Builder = Builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rtx, name)


@functools.cache
def real_tensorrt() -> RealTensorRT | None:
    """Return the real builder; None where its package does not exist."""
    return RealTensorRT() if importlib.util.find_spec("tensorrt_rtx") else None


def accepted(record: Record, family: str, precision: str, model: onnx.ModelProto) -> None:
    """Assert that every GPU runtime accepts *model*, and record it with the fixture `record_property`."""
    record(PROPERTY, [family, precision, "TensorRT", built(model, precision)])
    missing = without_kernel(model)
    outcome = f"no kernel: {', '.join(missing)}" if missing else "ok"
    record(PROPERTY, [family, precision, "ONNX Runtime CUDA", outcome])
    assert not missing or precision == "bf16-backbone"


def built(model: onnx.ModelProto, precision: str) -> str:
    """Build the plan of *model* with our own code."""
    trt = real_tensorrt()
    if trt is None:
        return ABSENT
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    sizes = [(fixed, fixed)] if fixed else [(1, 1), (2, 3)]
    profiles = tuple(Profile(minimum=low, optimum=high, maximum=high) for low, high in sizes)
    check_precision(model, precision, (11, 0))
    safe, _ = lint(model, (11, 0), profiles)
    request = BuildRequest(onnx=safe.SerializeToString(), profiles=profiles, precision=precision)
    assert build(trt, request, lambda _: None).plan
    return "ok"


def without_kernel(model: onnx.ModelProto) -> list[str]:
    """List the operators of *model* that ONNX Runtime has no CUDA kernel for, with their types."""
    types = value_types(model)
    opset = max(entry.version for entry in model.opset_import if entry.domain == "")
    missing = set()
    for node in model.graph.node:
        first = node.input[1 if node.op_type == "Where" else 0]
        kind = onnx.helper.tensor_dtype_to_string(types[first]).removeprefix("TensorProto.").lower()
        added = KERNELS["added"].get(node.op_type, {}).items()
        later = " ".join(kinds for since, kinds in added if opset >= int(since))
        if kind not in f"{KERNELS['kernels'].get(node.op_type, '')} {later}".split():
            missing.add(f"{node.op_type}({kind})")
    return sorted(missing)


def matrix(properties: Iterable[tuple[str, Any]]) -> list[str]:
    """Lay out what was recorded as one line for each family and runtime, with a footnote for each remark."""
    cells: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name, value in properties:
        if name == PROPERTY:
            family, precision, runtime, outcome = value
            cells[family, runtime][precision] = outcome
    not_built = "not built in this run; `make test-models` builds the slow ones"
    notes = {not_built: "-"}
    width = max((len(family) for family, _ in cells), default=0)
    lines = []
    for (family, runtime), found in sorted(cells.items()):
        shown = []
        for precision in PRECISIONS:
            outcome = found.get(precision, not_built)
            mark = "ok" if outcome == "ok" else notes.setdefault(outcome, f"[{len(notes)}]")
            shown.append(f"{precision} {mark:4}")
        lines.append(f"{family:{width}}  {runtime:17}  {'  '.join(shown)}".rstrip())
    explained = [f"{mark}: {note}" for note, mark in notes.items() if any(mark in line for line in lines)]
    return [*lines, *explained]
