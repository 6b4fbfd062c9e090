"""Cache what torch's exporter computes again for every graph: operators, ONNX functions and their registry.

They take a quarter of the time of a small network's export and do not change between exports.
Networks on `meta`, which have no values, are built without initializing them, which takes a
third of the time.
"""

import functools
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._export.utils as operators
import torch._ops as overloads
from torch import Tensor
from torch._C import DispatchKey
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter import _registration as registration

FORMS = "get_torchlib_ops"
IMPLICIT = "CompositeImplicitAutograd"
UNDIFFERENTIABLE = "autograd_not_implemented"
GRADIENT_KEYS = "_AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE"
KERNEL_KEYS = "_BACKEND_KEYS_TO_OVERRIDE"
INITIALIZERS = (
    "constant_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "uniform_",
    "zeros_",
)
COLLECT = "_collect_all_valid_cia_ops"
COLLECT_ATEN = "_collect_all_valid_cia_ops_for_aten_namespace"


@functools.cache
def keep() -> None:
    """Cache these results in this process; after new operators are registered, they are collected again."""
    library = registration.onnxscript_apis  # imported when it is first asked for anything
    setattr(library, FORMS, functools.cache(lambda: library.__getattr__(FORMS)()))
    registry = registration.ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))  # type: ignore[assignment]
    overloads.Callable = typing.Callable  # type: ignore[assignment] # caches annotations, the other does not
    every = until_registered(getattr(operators, COLLECT))
    setattr(exported_program, COLLECT, every)
    setattr(decomp_utils, COLLECT, every)
    setattr(decomp_utils, COLLECT_ATEN, until_registered(getattr(operators, COLLECT_ATEN)))
    # For every decomposition, torch registers 21 kernels of each operator. These tests only run
    # on the CPU.
    setattr(
        exported_program,
        UNDIFFERENTIABLE,
        functools.cache(getattr(exported_program, UNDIFFERENTIABLE)),
    )
    setattr(
        exported_program, GRADIENT_KEYS, [DispatchKey.AutogradCPU, DispatchKey.AutogradMeta]
    )
    setattr(exported_program, KERNEL_KEYS, [DispatchKey.CPU, DispatchKey.Meta])
    for name in INITIALIZERS:
        setattr(torch.nn.init, name, unless_meta(getattr(torch.nn.init, name)))


def unless_meta(initialize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return *initialize*, without effect on a tensor on `meta`."""

    @functools.wraps(initialize)
    def initialize_values(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return tensor if tensor.is_meta else initialize(tensor, *arguments, **options)

    return initialize_values


def until_registered(collect: Callable[[], Any]) -> Callable[[], Any]:
    """Cache what *collect* returns until new operators are registered."""
    last: list[Any] = [None, None]

    def collected() -> Any:
        known = torch._C._dispatch_get_registrations_for_dispatch_key(IMPLICIT)
        if known != last[0]:
            last[:] = known, collect()
        return last[1]

    return collected


@contextmanager
def one_thread() -> Iterator[None]:
    """Cache these results; use one torch thread until the block ends, faster for small networks."""
    keep()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
