"""Generated textures have the documented properties: classes differ in second moments only."""

import functools

import torch
from gain.textures import TextureConfig, class_filters, gaussian_fields
from torch import Tensor

CLEAN = TextureConfig(classes=4)
COUNT = 600  # fields per class


@functools.cache
def clean_fields() -> list[Tensor]:
    """Generate the fields of each class without nuisances."""
    filters = class_filters(CLEAN, 0)
    random = torch.Generator().manual_seed(1)
    return [gaussian_fields(filters, torch.full((COUNT,), index), random) for index in range(CLEAN.classes)]


def test_every_class_has_mean_zero_and_power_one_in_every_channel() -> None:
    for drawn in clean_fields():
        means = drawn.mean(dim=(2, 3))
        error = means.std(dim=0) / COUNT**0.5
        assert (means.mean(dim=0).abs() < 4 * error).all()
        powers = drawn.square().mean(dim=(2, 3))
        assert ((powers.mean(dim=0) - 1).abs() < 4 * powers.std(dim=0) / COUNT**0.5).all()


def channel_covariances(drawn: Tensor) -> Tensor:
    """Compute the (B, 3, 3) channel covariance of each field."""
    flat = drawn.flatten(start_dim=2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def test_classes_differ_in_channel_covariances() -> None:
    covariances = [channel_covariances(drawn) for drawn in clean_fields()]
    for first in range(CLEAN.classes):
        for second in range(first):
            apart = covariances[first].mean(dim=0) - covariances[second].mean(dim=0)
            error = (covariances[first].var(dim=0) + covariances[second].var(dim=0)).div(COUNT).sqrt()
            assert (apart.abs() / error).max() > 8
