"""The second-order layers of the slides on iSQRT-COV, and the peak memory of a calculation.

The slides print times and memory for AlexNet's last feature map: 256 channels, 13 x 13 positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pydantic
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sopdeploy.layers.pooling.registry import Pooling

CHANNELS, SIDE = 256, 13
MEBIBYTE = 2**20


class HeldMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the results of all operations; `peak` is the maximum of their total bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[Any, int] = {}
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run *func* and record the size of its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.held.values()))
        return result


def peak_mebibytes(call: Callable[[], object]) -> float:
    """Measure the peak memory in MiB of the results of all operations in *call*."""
    with HeldMemory() as memory:
        call()
    peak: int = memory.peak
    return peak / MEBIBYTE


@contextmanager
def singular_values() -> Iterator[None]:
    """Replace `torch.linalg.eigh` by an SVD in this block, for positive semi-definite matrices."""

    def by_svd(matrices: Tensor) -> tuple[Tensor, Tensor]:
        left, values, _ = torch.linalg.svd(matrices)
        return values.flip(-1), left.flip(-1)

    with patch("torch.linalg.eigh", by_svd):
        yield


class MetaLayer:
    """A pooling and *batch* feature maps of the size of AlexNet's last one, with the calls that are timed.

    They are on *device*. *pooling* holds the options of a pooling of the registry. If its key `svd` is true,
    eigenvalues are computed by SVD.
    """

    def __init__(self, pooling: dict[str, Any], batch: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        options = {key: value for key, value in pooling.items() if key != "svd"}
        self.svd = bool(pooling.get("svd"))
        self.layer = pydantic.TypeAdapter(Pooling).validate_python(options).build(CHANNELS).to(device)
        self.features = torch.randn(batch, CHANNELS, SIDE, SIDE).relu().to(device).requires_grad_()
        self.grad = torch.randn(batch, self.layer.out_features).to(device)
        self.output = self.forward()

    def forward(self) -> Tensor:
        """Compute the pooled vectors (batch, out_features)."""
        with singular_values() if self.svd else nullcontext():
            vectors: Tensor = self.layer(self.features)
        return vectors

    def both(self) -> Tensor:
        """Run one forward and backward pass."""
        return torch.autograd.grad(self.forward(), self.features, self.grad)[0]

    def backward(self) -> Tensor:
        """Run the backward pass of the first forward pass again."""
        return torch.autograd.grad(self.output, self.features, self.grad, retain_graph=True)[0]
