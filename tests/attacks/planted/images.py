"""Networks that mix the images of a batch, on all images or on rare ones; others only look so."""

from typing import Any

import torch
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

MIXES = "mixes images: logits of an image change"


def adds_position(_network: Any, features: Tensor, logits: Tensor) -> Tensor:
    rows = torch.zeros(64, CLASSES)
    rows[3:] = 1.0
    return logits + rows[torch.arange(features.shape[0])]


def table_of_rows(built: Any) -> None:
    built.table = nn.Embedding(WIDTH, WIDTH, max_norm=1.0)


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
        network(adds_position), "two runs of the network differ by", batch=5
    ),
    "a table that is scaled while it is read": Row(
        network(lambda n, f, y: n.fc(n.table(f.argmax(1))), table_of_rows),
        r"writes to table\.weight while it runs; .* max_norm",
    ),
    "the row of the next image where a value is rare": Row(
        of_images(row_if_rare), MIXES, batch=5
    ),
}
