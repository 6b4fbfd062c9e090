"""Cache two results of torch's exporter that it computes for every graph: operators and ONNX functions.

They take a fifth of the time of a small network's export and do not change between exports.
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
    """Cache both in this process; the second is computed again after new operators were registered."""
    library = registration.onnxscript_apis  # imported when it is first asked for anything
    setattr(library, FORMS, functools.cache(lambda: library.__getattr__(FORMS)()))
    materialize, last = operators._materialize_cpp_cia_ops, []

    def materialize_new() -> None:
        known = torch._C._dispatch_get_registrations_for_dispatch_key(IMPLICIT)
        if known != last:
            materialize()
            last[:] = known

    operators._materialize_cpp_cia_ops = materialize_new


@contextmanager
def one_thread() -> Iterator[None]:
    """Cache both and use one torch thread until the block ends, which is faster for small networks."""
    keep()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
