"""Cache what torch's exporter computes again for every graph: operators, ONNX functions and their registry.

They take a quarter of the time of a small network's export and do not change between exports.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._export.utils as operators
from torch.onnx._internal.exporter import _registration as registration

FORMS = "get_torchlib_ops"
IMPLICIT = "CompositeImplicitAutograd"


@functools.cache
def keep() -> None:
    """Cache them in this process; operators are collected again after new ones were registered."""
    library = registration.onnxscript_apis  # imported when it is first asked for anything
    setattr(library, FORMS, functools.cache(lambda: library.__getattr__(FORMS)()))
    registry = registration.ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))  # type: ignore[assignment]
    materialize, last = operators._materialize_cpp_cia_ops, []

    def materialize_new() -> None:
        known = torch._C._dispatch_get_registrations_for_dispatch_key(IMPLICIT)
        if known != last:
            materialize()
            last[:] = known

    operators._materialize_cpp_cia_ops = materialize_new


@contextmanager
def one_thread() -> Iterator[None]:
    """Cache them and use one torch thread until the block ends, which is faster for small networks."""
    keep()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
