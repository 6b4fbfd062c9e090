"""Counting: parameters and multiply-adds of what trains and of what ships.

Conventions: parameters are all learnable tensors (batch norm's affine in, running statistics out);
MACs are the multiply-adds of convolutions and linear layers for one image, without bias. A module that
does less than its layers show (a mixture runs K of N components) counts itself: `CountsItself`.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sopdeploy.errors import ConfigError
from sopdeploy.frozen import Frozen
from sopdeploy.models.catalog import create_model, entry

PROBE_BATCH = 2  # batch norm in train mode refuses a single value per channel


@runtime_checkable
class CountsItself(Protocol):
    """A module that knows its multiply-adds better than its layers do."""

    def macs(self, features: torch.Size) -> int:
        """Return the multiply-adds of one image of an input of this shape."""


class Counts(Frozen):
    """Learnable parameters, and multiply-adds of one image."""

    parameters: int
    macs: int


class Description(Frozen):
    """What `sopdeploy describe` prints; `representation` is the vector the shipped head sees."""

    name: str
    config: dict[str, Any]
    num_classes: int
    image_size: int
    training: Counts
    shipped: Counts
    representation: int
    training_only: tuple[str, ...]
    loss_weights: dict[str, float]


def describe(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, **config: Any
) -> Description:
    """Return the counts of catalog model *name*; nothing is allocated, weights are on `meta`.

    *image_size* is the side of the input in pixels. Raises `ConfigError`.
    """
    side = entry(name).image_size if image_size is None else image_size
    with torch.device("meta"):
        network = create_model(name, num_classes=num_classes, **config)
        shipped = network.plain()
    try:
        training, shipping = count(network.train(), side), count(shipped.eval(), side)
    except RuntimeError as problem:
        raise ConfigError(f"image_size: {side} pixels are too few for {name}") from problem
    return Description(
        name=name,
        config=network.config.model_dump(mode="json"),
        num_classes=network.num_classes,
        image_size=side,
        training=training,
        shipped=shipping,
        representation=network.representation(),
        training_only=network.training_only,
        loss_weights=network.loss_weights(),
    )


def count(network: nn.Module, image_size: int) -> Counts:
    """Return the counts of *network*, which lies on `meta`, in the mode it is in."""
    parameters = sum(tensor.numel() for tensor in network.parameters())
    macs = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, CountsItself):
            macs += module.macs(inputs[0].shape)
        else:
            macs += layer_macs(module, output)

    handles: list[RemovableHandle] = [
        module.register_forward_hook(add)
        for module in network.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | CountsItself)
    ]
    with torch.no_grad():
        network(torch.empty(PROBE_BATCH, 3, image_size, image_size, device="meta"))
    for handle in handles:
        handle.remove()
    return Counts(parameters=parameters, macs=macs)


def layer_macs(layer: nn.Module, output: Tensor) -> int:
    """Return the multiply-adds of one image in *layer*, from the shape of its output."""
    outputs = output[0].numel()
    if isinstance(layer, nn.Linear):
        return outputs * layer.in_features
    weight = layer.get_parameter("weight")
    return outputs * weight[0].numel()
