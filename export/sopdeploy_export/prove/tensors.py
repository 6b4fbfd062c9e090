"""Tensors in the arguments and results of operators: which there are, their memory and their layouts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_LEAVES = (bool, float, int, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape, strides and type of a tensor that an operator made in memory of its own."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """Return a tensor of this layout, without content."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)


def layout_of(tensor: Tensor) -> Layout:
    """Return the layout of *tensor*."""
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def is_plain(tensor: Tensor) -> bool:
    """Return whether *tensor* is a dense `Tensor`, of no subclass, that begins where its memory does."""
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and not (is_lazy or tensor.is_meta or tensor.storage_offset())
    )


def tensors_in(values: Any) -> list[Tensor]:
    """List the tensors in *values*; most are tuples of few, for which `tree_leaves` takes long."""
    if isinstance(values, Tensor):
        return [values]
    if type(values) in _LEAVES:
        return []
    if type(values) in (list, tuple):
        return [tensor for value in values for tensor in tensors_in(value)]
    if type(values) is dict:
        return [tensor for value in values.values() for tensor in tensors_in(value)]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    """Return a number that tells the memory of *tensor* from any other."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # within vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata
