"""Networks that hold infinities: those of a mask are right, and those of a damaged checkpoint are not."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.attacks.planted.network import (
    CLASSES,
    LIMIT,
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
BROKEN = r"^{} holds NaN or infinite values; train again or use an earlier checkpoint$"


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


def parameter(mask: Tensor, *, learns: bool = False) -> Change:
    return puts(mask=lambda: nn.Parameter(mask.clone(), requires_grad=learns))


def damaged(name: str, value: float) -> Row:
    """Plant a network with a batch norm, whose tensor *name* has one number of another *value*."""

    def damage(built: Any) -> None:
        built.norm = nn.BatchNorm1d(WIDTH)
        owner, _, attribute = name.rpartition(".")
        getattr(built.get_submodule(owner), attribute).data.view(-1)[0] = value

    kind = network(lambda n, f, y: n.fc(n.norm(f).relu()), damage)
    return Row(kind, BROKEN.format(name.replace(".", r"\.")))


MASK_BROKEN = BROKEN.format("mask")
INFINITIES: dict[str, Row] = {
    # Right: the logits are finite, and the file has the same infinities.
    "a mask that is a constant parameter": masked(parameter(causal())),
    "a mask that is a parameter which learns": masked(parameter(causal(), learns=True)),
    "a mask that is a buffer": masked(buffer("mask", causal())),
    "a limit of plus infinity": Row(
        network(
            lambda n, f, y: torch.minimum(y, n.limits),
            puts(
                limits=lambda: nn.Parameter(
                    torch.tensor([LIMIT] + [INFINITE] * (CLASSES - 1)), requires_grad=False
                )
            ),
        )
    ),
    # Their siblings
    "NaN in a mask": masked(parameter(causal(torch.nan)), MASK_BROKEN),
    "NaN in a mask that is a buffer": masked(buffer("mask", causal(torch.nan)), MASK_BROKEN),
    "a mask that leaves nothing": masked(parameter(causal(full_row=3)), MASK_BROKEN),
    "a mask of plus infinity": masked(parameter(causal(INFINITE)), MASK_BROKEN),
    "a weight of infinity": damaged("conv.weight", INFINITE),
    "a weight of NaN": damaged("conv.weight", torch.nan),
    "a bias of infinity": damaged("fc.bias", -INFINITE),
    "a mean of infinity, behind a relu": damaged("norm.running_mean", INFINITE),
    "a variance of infinity": damaged("norm.running_var", INFINITE),
}
