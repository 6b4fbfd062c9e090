"""Times of second-order layers and of matrix functions, as the slides on iSQRT-COV print them.

A layer reads maps of the size of AlexNet's last one; a matrix function, the covariance of one such map.
"""

from collections.abc import Callable
from statistics import median
from timeit import repeat
from typing import Any

import pydantic
import torch
from torch import Tensor

from sopdeploy.layers.newton_schulz import newton_schulz
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.recipe import Recipe

_CHANNELS, _SIDE, _IMAGES = 256, 13, 8
_RUNS = 9  # after one warm-up run
_FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "eig": torch.linalg.eigh,
    "svd": torch.linalg.svd,
    "newton-schulz": lambda matrix: newton_schulz(matrix[None] / matrix.trace(), 5),
}


def time_layer(layer: dict[str, Any], recipe: Recipe) -> dict[str, float]:
    """Time *layer* in milliseconds on the device and with the threads of *recipe*.

    *layer* holds the options of a pooling, timed per image, or the `kind` of a matrix function, timed per
    matrix. The result has forward and backward pass together (FP+BP), and the backward pass alone (BP).
    """
    device = select_device(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(0)
    maps = torch.randn(_IMAGES, _CHANNELS, _SIDE, _SIDE).relu().to(device)
    call, count = _FUNCTIONS.get(layer["kind"]), 1
    values = maps[0].flatten(start_dim=1).cov()
    if call is None:
        pooling = pydantic.TypeAdapter(Pooling).validate_python(layer).build(_CHANNELS).to(device)
        call, count, values = pooling, _IMAGES, maps
    values.requires_grad_()
    stored = _flat(call(values))
    gradient = torch.randn_like(stored)

    def backward(output: Tensor) -> None:
        torch.autograd.grad(output, values, gradient, retain_graph=True)

    return {
        "FP+BP, ms": median_milliseconds(lambda: backward(_flat(call(values))), device) / count,
        "BP, ms": median_milliseconds(lambda: backward(stored), device) / count,
    }


def _flat(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Join the results of a layer or a matrix function, which may be several, in one vector."""
    tensors = (results,) if isinstance(results, Tensor) else results
    return torch.cat([tensor.flatten() for tensor in tensors])


def median_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Measure the median time of *call* on *device* in milliseconds."""

    def call_and_wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    call_and_wait()
    return 1000 * median(repeat(call_and_wait, repeat=_RUNS, number=1))
