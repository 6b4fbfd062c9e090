"""Which of several equal forms is fastest here: each is exported alone and timed in ONNX Runtime.

The forms run in turn, at one image and at the bundle's usual batch, one thread, by this process's own clock,
which neighbours on a busy machine disturb least. The winner has the smallest product of its medians.
`by_thumb` is the other chooser: it believes the rule of thumb, so that an export without `--autotune` is the
same everywhere.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError
from sopdeploy_export.graph.onnx_export import OPSET
from sopdeploy_export.graph.torch_export import export
from sopdeploy_export.rewrites.context import Forms

RUNS, WARMUPS = 15, 3


def as_it_is(form: nn.Module) -> nn.Module:
    """Return *form*: what ships in float32 has no casts."""
    return form


@dataclass(frozen=True, slots=True)
class Heuristic:
    """Takes what the rule of thumb says."""

    by: str = "rule of thumb"

    def __call__(self, forms: Forms) -> str:
        """Return its name."""
        return forms.thumb


@dataclass(frozen=True, slots=True)
class Timed:
    """Takes the fastest at one image and at the usual batch, with the casts that it will ship with."""

    batch: BatchRange
    cast: Callable[[nn.Module], nn.Module]
    by: str = "autotune"

    def __call__(self, forms: Forms) -> str:
        """Return the name of the fastest."""
        sessions = {name: open_form(self.cast(form), forms.inputs) for name, form in forms.built.items()}
        taken: dict[str, dict[int, float]] = {name: {} for name in forms.built}
        for size in sorted({1, self.batch.optimum}):
            feeds = [repeated(value, size) for value in forms.inputs]
            for name, seconds in medians(sessions, feeds).items():
                taken[name][size] = seconds
        return min(taken, key=lambda name: math.prod(taken[name].values()))


def open_form(form: nn.Module, inputs: tuple[Tensor, ...]) -> ort.InferenceSession:
    """Return *form* alone in ONNX Runtime, for any batch size, on one thread."""
    batch = Dim("batch", min=1)
    program = export(form, inputs, tuple({0: batch} for _ in inputs))
    lowered = torch.onnx.export(
        program, (), dynamo=True, opset_version=OPSET, external_data=False, verbose=False
    )
    if lowered is None:
        raise LoweringError("no ONNX form: the converter gave nothing")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    raw = lowered.model_proto.SerializeToString()
    return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def repeated(value: Tensor, size: int) -> NDArray[np.float32]:
    """Return *size* images of the observed ones, over and over."""
    array: NDArray[np.float32] = value.float().numpy()
    return array[np.arange(size) % len(array)]


def medians(sessions: dict[str, ort.InferenceSession], feeds: list[NDArray[np.float32]]) -> dict[str, float]:
    """Return the median seconds of each session on *feeds*, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for run in range(WARMUPS + RUNS):
        for name, session in sessions.items():
            named = dict(zip((given.name for given in session.get_inputs()), feeds, strict=True))
            start = time.process_time()
            session.run(None, named)
            if run >= WARMUPS:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
