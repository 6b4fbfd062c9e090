"""Networks that hold infinities: those of a mask are right, and those of a damaged checkpoint are not."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.attacks.planted.network import (
    SIDE,
    WIDTH,
    Change,
    Row,
    buffer,
    network,
    of_images,
    puts,
)

INFINITE = torch.inf
BROKEN = "^{} holds NaN or infinite values"


def causal(value: float = -INFINITE, full_row: int | None = None) -> Tensor:
    """Return a mask (S, S) with *value* above its diagonal, and in all of *full_row*, if any."""
    mask = torch.zeros(SIDE, SIDE)
    mask[torch.ones(SIDE, SIDE).triu(1).bool()] = value
    if full_row is not None:
        mask[full_row] = value
    return mask


def attends(built: Any, images: Tensor) -> Tensor:
    """Let the rows of the features attend to those that the mask leaves."""
    rows = built.conv(images).mean(2).transpose(1, 2)  # (B, S, 8)
    scores = rows @ rows.transpose(1, 2) + built.mask
    logits: Tensor = built.fc((scores.softmax(2) @ rows).mean(1))
    return logits


def masked(mask: Change, refused: str = "") -> Row:
    return Row(of_images(attends, mask), refused)


def parameter(mask: Tensor) -> Change:
    return puts(mask=lambda: nn.Parameter(mask.clone(), requires_grad=False))


def damage(built: Any) -> None:
    built.norm = nn.BatchNorm1d(WIDTH)
    built.norm.running_var[0] = INFINITE  # the other logits stay finite


MASK_BROKEN = BROKEN.format("mask")
INFINITIES: dict[str, Row] = {
    # Right: the logits are finite, and the file has the same infinities.
    "a mask that is a constant parameter": masked(parameter(causal())),
    "NaN in a mask that is a buffer": masked(buffer("mask", causal(torch.nan)), MASK_BROKEN),
    "a mask that leaves nothing": masked(parameter(causal(full_row=3)), MASK_BROKEN),
    "a variance of infinity": Row(
        network(lambda n, f, y: n.fc(n.norm(f).relu()), damage),
        BROKEN.format(r"norm\.running_var"),
    ),
}
