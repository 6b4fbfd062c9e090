"""The mode in which a network computes in float64, the reference of every comparison."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GET_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
REDUCED = (torch.float16, torch.bfloat16, torch.float32)


class InFloat64(TorchDispatchMode):
    """Compute in float64 also where the code of a network names another type, as `.float()` does.

    Constants that `.double()` does not reach, such as tensors made in `forward`, are converted where an
    operation combines them with float64. The code of a network reads float32 as the `dtype` of float64, so
    that it takes the same path.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes = ReportsFloat32()

    def __enter__(self) -> Self:
        """Enter both modes."""
        self._dtypes.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Leave both modes."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._dtypes.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation in float64 if an argument names a smaller type or an operand is float64."""
        del types
        call = (tuple(map(in_float64, args)), {key: in_float64(v) for key, v in (kwargs or {}).items()})
        with torch._C.DisableTorchFunction():  # reads the true types
            dtypes = {value.dtype for value in tree_leaves(call) if isinstance(value, Tensor)}
            # An operation that writes to an operand needs this operand itself, not a converted copy.
            if torch.float64 in dtypes and dtypes & set(REDUCED) and not func._schema.is_mutable:
                call = tree_map_only(Tensor, lambda t: t.double() if t.dtype in REDUCED else t, call)
            return func(*call[0], **call[1])


class ReportsFloat32(TorchFunctionMode):
    """Returns float32 as the `dtype` of tensors in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call *function*."""
        del types
        result = function(*args, **(kwargs or {}))
        return torch.float32 if result is torch.float64 and function == GET_DTYPE else result


def in_float64(value: Any) -> Any:
    """Replace *value*, an argument of an operation, by float64 if it is a smaller floating-point type."""
    return torch.float64 if any(value is dtype for dtype in REDUCED) else value
