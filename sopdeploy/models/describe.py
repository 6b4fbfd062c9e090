"""Describe a network: parameters and multiply-adds of training and inference model, and published figures."""

from typing import Any

import torch

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.published import Published, published
from sopdeploy.models.registry import create_model, entry
from sopdeploy.models.stats import Counts, tally


class Description(StrictModel):
    """Output of `sopdeploy describe`.

    `representation` is the length of the vector that the exported classifier reads. `parts` are those of the
    network in training and sum to `training`; `published` holds the figures that papers print for exactly
    this network, if any.
    """

    name: str
    config: dict[str, Any]
    num_classes: int
    image_size: int
    training: Counts
    shipped: Counts
    representation: int
    training_only: tuple[str, ...]
    loss_weights: dict[str, float]
    parts: dict[str, Counts]
    published: tuple[Published, ...]


def describe(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, **config: Any
) -> Description:
    """Count catalog model *name* on the `meta` device, without allocating weights.

    *image_size* is the side of the input in pixels. Raises `ConfigError`.
    """
    side = entry(name).image_size if image_size is None else image_size
    with torch.device("meta"):
        network = create_model(name, num_classes=num_classes, **config)
        inference = network.inference_model() if network.training_only else None
    try:
        training = tally(network.train(), side)
        shipped = training if inference is None else tally(inference.eval(), side)
    except RuntimeError as problem:
        raise ConfigError(f"image_size: {side} pixels are too few for {name}") from problem
    length = network.num_features()
    figures: tuple[Published, ...] = ()
    if side == entry(name).image_size:
        figures = published(name, network.config, network.num_classes, training, shipped, length)
    return Description(
        name=name,
        config=network.config.model_dump(mode="json"),
        num_classes=network.num_classes,
        image_size=side,
        training=training.total(),
        shipped=shipped.total(),
        representation=length,
        training_only=network.training_only,
        loss_weights=network.loss_weights(),
        parts=training.by_part(network.training_only),
        published=figures,
    )
