"""What torch's exporter works out anew for every graph, though it never changes, is kept in the tests.

A fifth of a small network's export goes to parsing the sources of all operators that ONNX has a form for,
and to asking the dispatcher for its operators once for each namespace. The answers stay torch's own.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch._export.utils as operators
from torch.onnx._internal.exporter import _registration as registration

FORMS = "get_torchlib_ops"
IMPLICIT = "CompositeImplicitAutograd"


@functools.cache
def keep() -> None:
    """Do both once in this process, the second again only where an operator came in between."""
    library = registration.onnxscript_apis  # imported when it is first asked for anything
    setattr(library, FORMS, functools.cache(lambda: library.__getattr__(FORMS)()))
    operators._materialize_cpp_cia_ops = where_new(operators._materialize_cpp_cia_ops)


def where_new(materialise: Callable[[], None]) -> Callable[[], None]:
    """Return *materialise*, called only where the dispatcher knows other operators than last time."""
    last: list[str] = []

    def quick() -> None:
        known = torch._C._dispatch_get_registrations_for_dispatch_key(IMPLICIT)
        if known != last:
            materialise()
            last[:] = known

    return quick


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep both, and let torch compute in one thread until the block ends: small networks are quicker so."""
    keep()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
