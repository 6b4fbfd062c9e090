"""Networks that keep images apart are exported, whatever functions they use; others are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from sopdeploy.errors import LoweringError
from tests.export.user_network import networks as n


def covariance(network: Any, images: Tensor) -> Tensor:
    maps = F.pixel_unshuffle(network.stem(images), 4).flatten(2)
    return maps @ maps.transpose(1, 2) / 9


def both(network: Any, images: Tensor) -> Tensor:
    """Compute the features (2 B, 8) of the images, then of the mirrored images."""
    return network.features(torch.cat([images, images.flip(3)]))


def at_largest(network: Any, images: Tensor) -> Tensor:
    maps = network.stem(images).flatten(2)
    ordered = maps.sum(1, keepdim=True).sort(dim=2, descending=True, stable=True).indices
    return torch.take_along_dim(maps, ordered[:, :, :5], 2).mean(2)


def by_number(network: Any, images: Tensor) -> Tensor:
    tokens = network.stem(images).flatten(2).transpose(1, 2)
    largest = tokens.sum(2).sort(dim=1, descending=True, stable=True).indices[:, :5]
    return tokens[torch.arange(images.shape[0])[:, None], largest].mean(1)


def by_type(network: Any, images: Tensor) -> Tensor:
    if images.dtype != torch.float32:
        raise TypeError("float32 expected")
    return network.features(images) + torch.finfo(images.dtype).eps


FEATURES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a trace": lambda net, x: (
        covariance(net, x).diagonal(dim1=1, dim2=2).sum(-1, keepdim=True) * net.features(x)
    ),
    "a mean of views": lambda net, x: both(net, x).view(2, -1, 8).mean(0),
    "chunks": lambda net, x: sum(both(net, x).chunk(2)),
    "parts of the size of the batch": lambda net, x: sum(both(net, x).split(x.shape[0])),
    "slices of the size of the batch": lambda net, x: (
        (f := both(net, x))[: x.shape[0]] + f[x.shape[0] :] + f[-x.shape[0] :]
    ),
    "positions by the number of the image": by_number,
    "einsum with an ellipsis": lambda net, x: (
        torch.einsum("b...,b...->b", net.stem(x), net.stem(x))[:, None] * net.features(x)
    ),
    "einsum of matrices": lambda net, x: torch.einsum(
        "...im,...jm->...ij", *[net.stem(x).flatten(2)] * 2
    ).mean(2),
    "a Fourier transform": lambda net, x: torch.fft.rfft2(net.stem(x)).abs().mean((2, 3)),
    "a determinant": lambda net, x: (
        torch.linalg.det(covariance(net, x)[:, :3, :3] + torch.eye(3))[:, None] * net.features(x)
    ),
    "pooling with ceil_mode": lambda net, x: (
        F.max_pool2d(net.stem(x), 2, 4, ceil_mode=True).flatten(2).mean(2)
    ),
    "take_along_dim": lambda net, x: torch.take_along_dim(f := net.features(x), f.argsort(1), 1),
    "take_along_dim of maps": at_largest,
    "code that reads the type": by_type,
}


@pytest.mark.parametrize("case", FEATURES)
def test_a_network_that_keeps_images_apart_is_exported(case: str, tmp_path: Path) -> None:
    network = n.variant(lambda net, images: net.fc(FEATURES[case](net, images)), aux=False)
    exported = n.export_small(n.trained(network), tmp_path)
    assert exported.certificate.mixes_images == ()


class Scaled(n.Small):
    """Scales the rows of a table while it reads them."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.table = nn.Embedding(8, 8, max_norm=1.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.table(self.features(images).argmax(1)))


def regions(network: Any, images: Tensor) -> Tensor:
    corners = torch.tensor([[0.0, 0, 0, 6, 6], [0.0, 6, 6, 9, 9]])
    pooled = roi_align(network.stem(images), corners, 2).mean((0, 2, 3))
    return network.fc(pooled[None] + network.features(images))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an operator without a rule": (
        lambda: n.variant(regions, aux=False),
        r"^no rule for RoiAlign in forward shows that it keeps images apart; .* try allow_batch_dependence",
    ),
    "the views of the wrong image": (
        lambda: n.variant(lambda net, x: net.fc(both(net, x).view(-1, 2, 8).mean(1)), aux=False),
        r"^the network mixes images: Reshape in forward combines them, .* try allow_batch_dependence=True$",
    ),
    "a size of the batch": (
        lambda: n.variant(lambda net, x: net.fc(net.features(x)) * (1 if x.shape[0] < 9 else 2), aux=False),
        r"its code treats some batch sizes differently, or fixes the size; every size needs one graph$",
    ),
    "a table that is scaled while it is read": (
        Scaled,
        r"writes to table\.weight while it runs; .*: scale its rows once, and set max_norm to None$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_network_is_told_the_operator_or_the_tensor(case: str, tmp_path: Path) -> None:
    build, message = REFUSED[case]
    with pytest.raises(LoweringError, match=message):
        n.export_small(n.trained(build()), tmp_path)
