"""Networks that mix the images of a batch, on all images or on rare ones; others only look so."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attacks.planted.network import (
    CLASSES,
    WIDTH,
    Row,
    logits_of,
    network,
    of_images,
    rare,
)

MIXES = (
    r"mixes images: logits of an image change with .*; try allow_batch_dependence|"
    r"two runs of the network differ by .* place of an image"
)


def both(built: Any, images: Tensor) -> Tensor:
    """Compute the features (2 B, 8) of the images, then of the mirrored images."""
    features: Tensor = built.features(torch.cat([images, images.flip(3)]))
    return features


def adds_position(_network: Any, features: Tensor, logits: Tensor) -> Tensor:
    rows = torch.zeros(64, CLASSES)
    rows[3:] = 1.0
    return logits + rows[torch.arange(features.shape[0])]


def position_and_class(_network: Any, features: Tensor, logits: Tensor) -> Tensor:
    table = torch.zeros(64, CLASSES)
    table[3:] = torch.arange(1.0, CLASSES + 1)
    return logits + table[torch.arange(features.shape[0]), logits.argmax(1)][:, None]


def table_of_rows(built: Any) -> None:
    built.table = nn.Embedding(WIDTH, WIDTH, max_norm=1.0)


def nearest_rows(features: Tensor, shift: int, extra: int) -> Tensor:
    """Return for each of T tokens of (B, T, C) that of its image, or of one *shift* later, which is nearest.

    It is the one *extra* tokens behind the nearest, which can be in the next image.
    """
    batch, tokens, channels = features.shape
    distances = (features[:, None] - features[:, :, None]).square().sum(3)  # (B, T, T)
    nearest = (distances + 1e6 * torch.eye(tokens)).argmin(2)
    base = torch.arange(batch)[:, None] * tokens + shift * tokens + extra
    rows = torch.cat([features, features]).reshape(-1, channels)
    return rows[(nearest + base).reshape(-1)].view(batch, tokens, channels)


def neighbors(built: Any, images: Tensor, shift: int = 0, extra: int = 0) -> Tensor:
    """Let each column of the features see its nearest one, by indices into the rows of all images."""
    tokens = built.conv(images).mean(2).transpose(1, 2)  # (B, T, 8)
    logits: Tensor = built.fc((tokens + nearest_rows(tokens, shift, extra)).amax(1))
    return logits


def of_a_constant(built: Any, images: Tensor) -> Tensor:
    """Multiply tokens of all images with each other, after a norm over an axis of one number."""
    tokens = built.conv(images).mean((1, 2))[..., None]  # (B, T, 1)
    query = F.layer_norm(tokens, (1,), torch.ones(1), torch.ones(1))[..., 0]  # ones, (B, T)
    scores = query @ query.transpose(0, 1)
    return logits_of(built, images) * (1 + scores[:, :1] / tokens.shape[1])


def next_if_rare(built: Any, images: Tensor) -> Tensor:
    logits = logits_of(built, images)
    next_one = torch.cat([logits[1:], logits[:1]])
    return torch.where(rare(images) > 0, next_one, logits)


def row_if_rare(built: Any, images: Tensor) -> Tensor:
    """Return the row of the next image, by its index, if a value of an image is rare."""
    logits = logits_of(built, images)
    rows = torch.arange(images.shape[0]) + (rare(images)[:, 0] > 0)
    return torch.cat([logits, logits])[rows]


IMAGES: dict[str, Row] = {
    "the mean of the batch": Row(
        network(lambda n, f, y: y - 0.1 * y.mean(0, keepdim=True)), MIXES, batch=5
    ),
    "a row of a table for each position in the batch": Row(
        network(adds_position), MIXES, batch=5
    ),
    "the views of the wrong image": Row(
        of_images(lambda n, x: n.fc(both(n, x).view(-1, 2, WIDTH).mean(1))), MIXES, batch=5
    ),
    "the views of the image": Row(
        of_images(lambda n, x: n.fc(both(n, x).view(2, -1, WIDTH).mean(0)))
    ),
    "a table that is scaled while it is read": Row(
        network(lambda n, f, y: n.fc(n.table(f.argmax(1))), table_of_rows),
        r"writes to table\.weight while it runs; .*: scale its rows once, and set max_norm to None$",
    ),
    "the mean of the batch times zero": Row(
        network(lambda n, f, y: y + 0 * y.mean(0, keepdim=True)), batch=5
    ),
    "indices into the rows of the next image": Row(
        of_images(lambda n, x: neighbors(n, x, shift=1)), MIXES, batch=5
    ),
    "the next image where a value is rare": Row(
        of_images(next_if_rare), MIXES + "|cannot be captured", batch=5
    ),
    "a row of a table for each position and class": Row(
        network(position_and_class), MIXES, batch=5
    ),
    "the row of the next image where a value is rare": Row(
        of_images(row_if_rare), MIXES, batch=5
    ),
    "equal images in the batch": Row(
        network(lambda n, f, y: y + (f[:, None] == f[None]).all(2).sum(1, keepdim=True)),
        MIXES,
        batch=5,
    ),
    # No image of uint8 pixels has so large features.
    "the largest value of the batch, if it is above all": Row(
        network(lambda n, f, y: y + (f.max() - 100).relu()), batch=5
    ),
    "indices into the rows of all images": Row(of_images(neighbors)),
    "indices into the rows of all images, one too many": Row(
        of_images(lambda n, x: neighbors(n, x, extra=1)), MIXES, batch=5
    ),
    "a product of constants of all images": Row(of_images(of_a_constant), batch=5),
}
