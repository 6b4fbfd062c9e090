"""Exported graphs as GPU runtimes receive them, checked without a GPU, and the matrix of what was checked.

TensorRT: our lint, parser call and strongly typed build with TensorRT-RTX, a sibling of TensorRT whose
builder needs no driver. It proves that a graph parses, is typed correctly and builds; not tactics or numbers.
ONNX Runtime: its CUDA provider opens the graph and leaves no operator to the CPU; see tests/cuda/build.py.
"""

import functools
import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import onnx

from tests.cuda.stand_in import ABSENT as NOT_HERE
from tests.cuda.stand_in import opened

PROPERTY, PLANNED = "gpu graph", "planned gpu graph"
RUNTIMES = ("TensorRT", "ONNX Runtime CUDA")
SLOW = "`make test-models` builds it, not this run"
UNPLANNED = "no test that was selected builds it"
MARKS = {"ok": "ok", SLOW: "slow", UNPLANNED: "-"}
PRECISIONS = ("fp32", "fp16", "bf16-backbone", "int8")
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
    packages = ("tensorrt_rtx", "sopdeploy_export.tensorrt")
    return RealTensorRT() if all(map(importlib.util.find_spec, packages)) else None


def accepted(record: Record, name: str, precision: str, model: onnx.ModelProto) -> None:
    """Assert that every GPU runtime accepts *model*, and record it with the fixture `record_property`."""
    record(PROPERTY, [name, precision, RUNTIMES[0], built(model, precision)])
    answer = opened(model)
    record(
        PROPERTY,
        [name, precision, RUNTIMES[1], answer if answer in {"ok", NOT_HERE} else f"refused: {answer[:200]}"],
    )
    assert answer in {"ok", NOT_HERE} or precision == "bf16-backbone", answer


def built(model: onnx.ModelProto, precision: str) -> str:
    """Build the plan of *model* with our own code, an optional part."""
    trt = real_tensorrt()
    if trt is None:
        return ABSENT
    from sopdeploy.tensorrt.profiles import Profile
    from sopdeploy_export.tensorrt.build import BuildRequest, build
    from sopdeploy_export.tensorrt.lint import check_precision, lint

    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    sizes = (fixed, fixed, fixed) if fixed else (1, 2, 3)
    profiles = (Profile(minimum=sizes[0], optimum=sizes[1], maximum=sizes[2]),)
    check_precision(model, precision, (11, 0))
    safe, _ = lint(model, (11, 0), profiles)
    request = BuildRequest(onnx=safe.SerializeToString(), profiles=profiles)
    assert build(trt, request, lambda _: None).plan
    return "ok"


def family(name: str) -> str:
    """Name what decides the operators in the graph of network *name*: its method, else its backbone.

    Branches are detached, so DSoP has the graph of its backbone. "resnet8 with cbp" is of the family "cbp".
    """
    plain, _, pooling = name.removeprefix("dsop-").replace("wrn", "preact-resnet").partition(" with ")
    method = re.match(r"(.+?)(-[\d-]+)?-(preact-)?(resnet|vgg|efficientnet)", plain)
    if pooling not in {"", "gap"}:
        return pooling
    return method[1] if method and method[1] != "preact" else re.sub(r"[\d-]+(x\d+d)?$", "", plain)


def matrix(properties: Iterable[tuple[str, Any]]) -> list[str]:
    """Lay out what was recorded as one line for each family, and explain every mark that is not "ok".

    A cell without a result is slow if a test that was not run has planned it with the marker `gpu_graph`.
    """
    outcomes: defaultdict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    planned = set()
    for name, value in properties:
        row, precision = family(value[0]), value[1]
        if name == PLANNED:
            planned.add((row, precision))
            outcomes.setdefault(row, {})
        elif name == PROPERTY and outcomes[row].get((value[2], precision), "ok") == "ok":
            outcomes[row][value[2], precision] = value[3]
    notes: dict[str, str] = {}
    width = max((len(row) for row in outcomes), default=0)
    columns = "  ".join(f"{precision:{len(precision) + 1}}" for precision in PRECISIONS)
    lines = [f"{'':{width}}  " + "    ".join(f"{runtime}: {columns}" for runtime in RUNTIMES)]
    for row, found in sorted(outcomes.items()):
        texts = []
        for runtime in RUNTIMES:
            marks = []
            for precision in PRECISIONS:
                outcome = found.get((runtime, precision), SLOW if (row, precision) in planned else UNPLANNED)
                mark = MARKS.get(outcome) or notes.setdefault(outcome, f"[{len(notes) + 1}]")
                marks.append(f"{mark:{len(precision) + 1}}")
            texts.append(" " * (len(runtime) + 2) + "  ".join(marks))
        lines.append(f"{row:{width}}  {'    '.join(texts)}".rstrip())
    used = {word for line in lines[1:] for word in line.split()}
    marks = [(mark, text) for text, mark in (MARKS | notes).items() if mark in used and text != "ok"]
    return [*lines, *(f"{mark}: {text}" for mark, text in marks)]
