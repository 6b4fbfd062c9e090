"""Python code that reads values of an image is found, whatever function it calls."""

import copy
import cProfile
import io
import operator
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sopdeploy_export.capture.program import recording_calls
from sopdeploy_export.capture.symbolic_forms import SymbolicForms
from sopdeploy_export.prove.dataflow import Dataflow, Remains
from sopdeploy_export.prove.function_reads import FunctionReads

READS: dict[str, Callable[[Tensor], Any]] = {
    "str": str,
    "repr": repr,
    "format": lambda x: f"{x}",
    "format of a number": lambda x: f"{x.sum():.2f}",
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "complex": lambda x: complex(x.sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "index": lambda x: operator.index(x.long().sum()),
    "in": lambda x: 1.0 in x,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "np.asarray": np.asarray,
    "np.array of rows": lambda x: np.array([*x]),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "is_nonzero": lambda x: torch.is_nonzero(x.sum()),
    "data_ptr": lambda x: x.data_ptr(),
    "untyped_storage": lambda x: x.untyped_storage(),
    "storage": lambda x: x.storage(),
    "dlpack": lambda x: np.from_dlpack(x),
    "torch.save": lambda x: torch.save(x, io.BytesIO()),
    "reduce": lambda x: x.__reduce_ex__(2),
    "apply_": lambda x: x.clone().apply_(abs),
    "map_": lambda x: x.clone().map_(x, max),
    "a range": lambda x: range(x.long().sum().clamp(0, 3)),
    "round": lambda x: math_trunc(x.sum()),
    "a number that has a value of the image": lambda x: bool(
        of_number(lambda c: c.copy_(x[0, 0])) > 2
    ),
    "a number whose data has a value": lambda x: bool(
        of_number(lambda c: c.data.copy_(x[0, 0])) > 2
    ),
    "a number that is a result": lambda x: bool(
        of_number(lambda c: torch.add(x[0, 0], 1, out=c)) > 2
    ),
    "a number and a value": lambda x: bool(torch.tensor(2) > x[0, 0]),
}
GRAPH: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: (x.shape, x.size(), x.size(0), x.dim(), x.ndim, len(x), x.numel()),
    "type": lambda x: (
        x.dtype,
        x.device,
        x.is_floating_point(),
        x.requires_grad,
        x.layout,
        x.is_cuda,
    ),
    "operators": lambda x: torch.cat([x.relu(), x[:1] * 2]).max(0),
    "iteration": lambda x: [*x],
    "unpacking": lambda x: x.unbind(0),
    "assignment": lambda x: x.clone().__setitem__(0, 1),
    "copy": lambda x: copy.copy(x.shape),
    "comparisons of Python numbers": lambda x: (
        (torch.as_tensor([0.1, 0.2], dtype=x.dtype) == 0).any().item()
    ),
    "layers": lambda x: nn.MultiheadAttention(4, 2).eval()(x, x, x),
    "transformer": lambda x: nn.TransformerEncoderLayer(4, 2, 8).eval()(x),
}


def of_number(change: Callable[[Tensor], object]) -> Tensor:
    number = torch.tensor(0.0)
    change(number)
    return number


def math_trunc(value: Tensor) -> int:
    return int(value.trunc())


def reads(function: Callable[[Tensor], Any]) -> list[str]:
    image = torch.ones(3, 4)
    flow = Dataflow(nn.Module(), {}, image, Remains())
    with (
        suppress(RuntimeError, TypeError),
        torch.no_grad(),
        flow,
        FunctionReads(flow),
        SymbolicForms(),
    ):
        function(image)
    return flow.reads + flow.failures


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", READS)
def test_a_read_is_found(name: str) -> None:
    assert reads(READS[name])


def test_a_profiler_goes_on_after_calls_were_recorded() -> None:
    """From Python 3.12 on, `cProfile` is not the profile function of the thread, so it is not interrupted."""
    calls: list[str] = []
    with cProfile.Profile() as profiler:
        before = sys.getprofile()
        with recording_calls(lambda frame, event, _: calls.append(frame.f_code.co_name)):
            math_trunc(torch.ones(()))
        assert sys.getprofile() is before
        recorded = len(calls)
        math_trunc(torch.ones(()))
    assert "math_trunc" in calls[:recorded] == calls
    assert "math_trunc" in {getattr(entry.code, "co_name", "") for entry in profiler.getstats()}
    assert sys.getprofile() is None


@pytest.mark.parametrize("name", GRAPH)
def test_what_a_graph_fixes_is_no_read(name: str) -> None:
    assert not reads(GRAPH[name])


@torch.library.custom_op("tests_reads::replace", mutates_args=())
def replace_nan(x: Tensor) -> Tensor:
    return x.nan_to_num()


@torch.library.custom_op("tests_reads::write", mutates_args=())
def write_unseen(x: Tensor) -> Tensor:
    x.numpy()[0] = 5
    return x.clone()


@pytest.mark.parametrize(("function", "is_noted"), [(replace_nan, False), (write_unseen, True)])
def test_an_operator_of_the_user_is_noted_only_if_it_writes_to_its_operand(
    function: Callable[[Tensor], Tensor], is_noted: bool
) -> None:
    image = torch.tensor([1.0, torch.nan])
    flow = Dataflow(nn.Module(), {}, image, Remains())
    with torch.no_grad(), flow:
        function(image)
    assert bool(flow.hidden_writes) == is_noted
