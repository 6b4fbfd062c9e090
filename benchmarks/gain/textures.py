"""Generated textures: classes that differ in their second moments and in nothing else.

A picture of class c is white noise behind the class's own 5x5 filter, a stationary Gaussian field of
3 x 32 x 32. Every field has mean 0 and every channel power 1, so no first moment and no power tells
the class; what tells it is how channels and neighbouring pixels covary. A class's filter is a base,
which all classes share, plus `spread` times one of its own.

Nuisances that leave the class alone: a contrast of the whole picture (log-normal), an offset of each channel,
a linear gradient of light.

With several `kinds` of pictures a texture means another class in each kind, and a colour of the whole
picture, a first moment, tells the kind: (texture, kind) is class texture + kind. No sum of something that
depends on the texture and something that depends on the kind gives that; a choice by kind does.
"""

import math
from typing import Annotated

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from gain.task import Task
from sopdeploy.config import StrictModel
from sopdeploy.data.base import derive_seed

SIDE, CHANNELS, REACH = 32, 3, 5
TEST_PICTURES = 4000
CUE = 1.5 * torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])


class TextureConfig(StrictModel):
    """How many pictures and classes, how far apart classes are, how strong the nuisances are."""

    train: int = 500
    classes: int = 10
    spread: float = 0.15
    kinds: Annotated[int, pydantic.Field(ge=1, le=4)] = 1
    contrast: float = 0.4
    offset: float = 0.5
    gradient: float = 0.5


def class_filters(config: TextureConfig, seed: int) -> Tensor:
    """Return (classes, 3, 3, 5, 5) filters, every output channel of unit length (unit power)."""
    random = torch.Generator().manual_seed(derive_seed(seed, "filters"))
    shape = (CHANNELS, CHANNELS, REACH, REACH)
    base = torch.randn(shape, generator=random)
    own = torch.randn(config.classes, *shape, generator=random)
    filters = base + config.spread * own
    return filters / filters.flatten(start_dim=2).norm(dim=2)[..., None, None, None]


def fields(filters: Tensor, looks: Tensor, random: torch.Generator) -> Tensor:
    """Return one Gaussian field (B, 3, 32, 32) for each of *looks*, which say its filter."""
    whole = SIDE + REACH - 1
    noise = torch.randn(len(looks), CHANNELS, whole, whole, generator=random)
    drawn = torch.empty(len(looks), CHANNELS, SIDE, SIDE)
    for index in looks.unique().tolist():
        members = looks == index
        drawn[members] = F.conv2d(noise[members], filters[index])
    return drawn


def disturbed(drawn: Tensor, config: TextureConfig, random: torch.Generator) -> Tensor:
    """Return *drawn* with a contrast, an offset and a gradient of light, freshly drawn for each picture."""
    count = len(drawn)
    contrast = (config.contrast * torch.randn(count, 1, 1, 1, generator=random)).exp()
    offset = config.offset * torch.randn(count, CHANNELS, 1, 1, generator=random)
    angle = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=random)
    ramp = torch.linspace(-1, 1, SIDE)
    light = angle.cos() * ramp[:, None] + angle.sin() * ramp[None, :]
    slope = config.gradient * torch.randn(count, 1, 1, 1, generator=random)
    return drawn * contrast + offset + slope * light


def textures(config: TextureConfig, seed: int) -> Task:
    """Return the random task of *seed*: its filters, its pictures to learn from, 4000 to be measured on."""
    filters = class_filters(config, seed)
    parts = []
    for name, count in (("train", config.train), ("test", TEST_PICTURES)):
        random = torch.Generator().manual_seed(derive_seed(seed, name))
        looks = torch.arange(count) % config.classes
        kinds = torch.arange(count) // config.classes % config.kinds
        pictures = disturbed(fields(filters, looks, random), config, random)
        if config.kinds > 1:
            pictures = pictures + CUE[kinds, :, None, None]
        parts.append((pictures, (looks + kinds) % config.classes))
    (train, labels), (test, test_labels) = parts
    return Task(train, labels, test, test_labels)
