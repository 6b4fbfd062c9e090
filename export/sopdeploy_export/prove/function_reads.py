"""What operators do not show: values of the image that functions of torch hand to Python."""

from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sopdeploy_export.prove.dataflow import BuiltinCall, Dataflow
from sopdeploy_export.prove.tensors import address, tensors_in

# Types of results without values that no operator shows, unless a function in `_READERS` returns
# them.
_HARMLESS = (Tensor, int, float, complex, type(None), torch.dtype, torch.device)
# Functions that hand out values, or the address of the memory with them, as numbers.
_READERS = ("apply_", "data_ptr", "map2_", "map_", "tolist")


class FunctionReads(TorchFunctionMode):
    """Reports what operators do not show: text, lists, arrays and addresses made of a tensor.

    What a built-in function reads of its own results is not reported if it returns tensors of the
    image only: then no number reaches the code of the network. For example, `one_hot` compares its
    smallest number with 0. A tensor of the image that becomes a number as an argument is reported:
    `x.narrow(1, start, 4)` is another operator for each `start`, and `torch.tensor([value])`, which
    no operator makes, another constant.
    """

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call *function*; note in the `reads` of the flow if it hands values of the image to Python."""
        del types
        kwargs = kwargs or {}
        flow = self._flow
        with flow.recording(function):
            call = BuiltinCall(frozenset(map(address, tensors_in((args, kwargs)))), [])

        # While a built-in function runs, its call collects what it reads of its own results.
        outer = flow.call
        is_builtin = isinstance(function, BuiltinFunctionType | MethodDescriptorType)
        flow.call = call if is_builtin else None
        try:
            result = function(*args, **kwargs)
        finally:
            flow.call = outer

        with flow.recording(function):
            if self._hands_out(function, args, kwargs, result, call):
                name = getattr(function, "__name__", str(function))
                flow.reads.append(f"{name} {flow.place()}")
        return result

    def _hands_out(
        self, function: Any, args: Any, kwargs: Any, result: Any, call: BuiltinCall
    ) -> bool:
        """Return whether *result* holds values of the image that no operator shows."""
        flow = self._flow
        leaves = tree_leaves(result)

        # A built-in function that has read values of its own results may return them, unless
        # all that it returns are tensors of the image.
        if call.reads and not all(map(flow.depends_on_image, leaves)):
            return True

        # An attribute hands out nothing, and neither does a call without tensors of the image.
        name = getattr(function, "__name__", "")
        is_attribute = name in ("__get__", "__set__", "type")
        if is_attribute or not flow.depends_on_image((args, kwargs)):
            return False

        # A function that returns text, arrays or addresses has read its tensors without an
        # operator.
        if name in _READERS or not all(isinstance(leaf, _HARMLESS) for leaf in leaves):
            return True

        # A tensor that no operator made, and that is no argument, is a new constant:
        # `torch.tensor` made it of its arguments. Those of a method such as
        # `x.new_tensor(data)` begin with `x`, of which it needs the dtype only.
        data = args[1:] if isinstance(function, MethodDescriptorType) else args
        has_new_constant = any(
            not flow.is_made(tensor) and address(tensor) not in call.arguments
            for tensor in tensors_in(result)
        )
        return has_new_constant and flow.depends_on_image((data, kwargs))
