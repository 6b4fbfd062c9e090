"""Generated textures: classes that differ in their second moments only.

An image of class c is white noise convolved with a 5x5 filter of the class, a stationary
Gaussian field of shape 3 x 32 x 32. Every field has mean 0 and every channel has power 1, so
neither first moments nor powers depend on the class; the covariances of channels and
neighboring pixels do. The filter of a class is a base, shared by all classes, plus `spread`
times a filter of its own.

Nuisances that do not depend on the class: a log-normal contrast per image, an offset per
channel, and a linear brightness gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gain.task import Task
from sopdeploy.config import StrictModel
from sopdeploy.seeds import derive_seed

SIDE, CHANNELS, FILTER_SIDE = 32, 3, 5
TEST_IMAGES = 4000


class TextureConfig(StrictModel):
    """Numbers of images and classes, distance of the classes, strength of the nuisances."""

    train: int = 500
    classes: int = 10
    spread: float = 0.15
    contrast: float = 0.4
    offset: float = 0.5
    gradient: float = 0.5


def class_filters(config: TextureConfig, seed: int) -> Tensor:
    """Generate (classes, 3, 3, 5, 5) filters with unit norm per output channel (unit power)."""
    random = torch.Generator().manual_seed(derive_seed(seed, "filters"))
    shape = (CHANNELS, CHANNELS, FILTER_SIDE, FILTER_SIDE)
    base = torch.randn(shape, generator=random)
    own = torch.randn(config.classes, *shape, generator=random)
    filters = base + config.spread * own
    return filters / filters.flatten(start_dim=2).norm(dim=2)[..., None, None, None]


def gaussian_fields(filters: Tensor, indices: Tensor, random: torch.Generator) -> Tensor:
    """Generate one Gaussian field for each filter index in *indices*, (B, 3, 32, 32)."""
    padded = SIDE + FILTER_SIDE - 1
    noise = torch.randn(len(indices), CHANNELS, padded, padded, generator=random)
    images = torch.empty(len(indices), CHANNELS, SIDE, SIDE)
    for index in indices.unique().tolist():
        members = indices == index
        images[members] = F.conv2d(noise[members], filters[index])
    return images


def add_nuisances(images: Tensor, config: TextureConfig, random: torch.Generator) -> Tensor:
    """Apply a random contrast, offset and brightness gradient to each of *images*."""
    count = len(images)
    contrast = (config.contrast * torch.randn(count, 1, 1, 1, generator=random)).exp()
    offset = config.offset * torch.randn(count, CHANNELS, 1, 1, generator=random)
    angle = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=random)
    ramp = torch.linspace(-1, 1, SIDE)
    direction = angle.cos() * ramp[:, None] + angle.sin() * ramp[None, :]
    slope = config.gradient * torch.randn(count, 1, 1, 1, generator=random)
    return images * contrast + offset + slope * direction


def textures(config: TextureConfig, seed: int) -> Task:
    """Generate the task of *seed*: filters, training images and 4000 test images."""
    filters = class_filters(config, seed)
    parts = []
    for name, count in (("train", config.train), ("test", TEST_IMAGES)):
        random = torch.Generator().manual_seed(derive_seed(seed, name))
        indices = torch.arange(count) % config.classes
        images = add_nuisances(gaussian_fields(filters, indices, random), config, random)
        parts.append((images, indices))
    (train, labels), (test, test_labels) = parts
    return Task(train, labels, test, test_labels)
