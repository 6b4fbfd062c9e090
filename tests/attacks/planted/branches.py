"""Networks whose branch runs in eval mode: some let it affect the output, the others only seem to.

They return the logits, or these beside those of the branch `aux`, which is removed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attacks.planted.network import (
    CLASSES,
    WIDTH,
    Answer,
    Change,
    Planted,
    Row,
    network,
    puts,
    trained,
)

NEEDED = r"^training_only: .* aux"
INSIDE = r"^training_only: .*operations of aux"


def case(answer: Answer, refused: str, *changes: Change, batch: int | None = None) -> Row:
    """Plant a network with another *answer*, from which its branch is removed."""
    return Row(network(answer, *changes), refused, ("aux",), batch=batch)


def right(answer: Answer, *changes: Change) -> Row:
    """Define a network whose *answer* does not need its branch."""
    return case(answer, "", *changes)


def branch(part: Callable[[], nn.Module]) -> Change:
    return lambda built: setattr(built, "aux", part())


class Branch(nn.Module):
    """A linear branch that has an effect beside its logits."""

    def __init__(self, effect: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.effect = effect

    def forward(self, features: Tensor) -> Any:
        return self.effect(self, features, self.head(features))


class Shift(nn.Module):
    """Has no tensors; changes what it gets in place."""

    def forward(self, features: Tensor) -> None:
        features.mul_(1.0)


class HiddenBranch(Planted):
    """Lists no tensors of the branch, but depends on it."""

    def named_modules(self, *arguments: Any, **options: Any) -> Any:
        listed = super().named_modules(*arguments, **options)
        return (item for item in listed if item[0] != "aux")

    def answer(self, features: Tensor, logits: Tensor) -> Tensor:
        return logits + 0 * self.aux(features)


def with_effect(effect: Callable[[Any, Tensor, Tensor], Any]) -> Change:
    return branch(lambda: Branch(effect))


def owned(effect: Callable[[Any, Tensor], object], **values: Callable[[], Any]) -> Change:
    """Add a branch with an *effect* on the network that holds it, and set attributes of this network."""

    def apply(part: Any, features: Tensor, logits: Tensor) -> Tensor:
        effect(part.owner[0], features)
        return logits

    def prepare(built: Any) -> None:
        built.aux = Branch(apply)
        built.aux.owner = [built]
        puts(**values)(built)

    return prepare


def beside(built: Any, features: Tensor, logits: Tensor) -> Any:
    """Return the logits, and what the branch returns."""
    return logits, built.aux(features)


def first(built: Any, features: Tensor, _logits: Tensor) -> Any:
    """Call the branch before the classifier."""
    branched = built.aux(features)
    return built.fc(features), branched


def by_value(built: Any, features: Tensor, logits: Tensor) -> Tensor:
    """Add nothing of the branch if the features are large."""
    if features.mean() > 1e9:
        return logits + 0 * built.aux(features)
    return logits


# The output depends on a tensor of the branch, and hides that
VALUES: dict[str, Row] = {
    "times zero": case(lambda n, f, y: y + 0 * n.aux(f), NEEDED),
    "what it returns unchanged": right(
        lambda n, f, y: n.fc(n.aux(f)), with_effect(lambda _part, x, _y: x)
    ),
    "by a value": case(by_value, "its code depends on values of the image"),
    "of a branch that is not listed": Row(HiddenBranch, NEEDED, ("aux",)),
}


def overlaps(built: Any) -> None:
    """Give a kept and a removed weight two storages over one array, with different starts."""
    kept = built.fc.weight
    removed = built.aux.weight
    array = np.zeros(2 * kept.numel(), np.float32)
    start = kept.numel() - 1
    kept.data = torch.from_numpy(array[: kept.numel()]).view_as(kept)
    removed.data = torch.from_numpy(array[start : start + removed.numel()]).view_as(removed)


def stored_beside(built: Any) -> None:
    """Give a kept and a removed weight one storage, in which they do not overlap."""
    kept = built.fc.weight
    removed = built.aux.weight
    both = torch.cat([kept.detach().flatten(), removed.detach().flatten()])
    kept.data = both[: kept.numel()].view_as(kept)
    removed.data = both[kept.numel() :].view_as(removed)


def registered_last(built: Any) -> None:
    """Register the classifier behind the branch, whose weight then comes first in their memory."""
    classifier = built.fc
    del built.fc
    built.fc = classifier


def reads_memory() -> nn.Module:
    """Build a network that reads the memory of its branch in Python, which no graph shows."""

    def answer(built: Any, _features: Tensor, logits: Tensor) -> Tensor:
        array, before = built.numbers
        return logits if (array == before).all() else logits + 1e-9

    built = trained(network(answer)())
    array = built.aux.weight.detach().numpy()
    built.numbers = (array, array.copy())
    return built


ALIASES: dict[str, Row] = {
    "a view of its weight": case(
        lambda n, f, y: y + f @ n.alias[0].t(),
        "by a view of its memory",
        lambda n: setattr(
            n, "alias", [n.aux.weight.data]
        ),  # in a list, no table of torch has it
    ),
    "a number of its memory, read in Python": Row(reads_memory, "", ("aux",)),
    "a module under a second name": case(
        lambda n, f, y: y + 0 * n.other(f),
        "shares its memory with other",
        lambda n: setattr(n, "other", n.aux),
    ),
    "overlapping memory with another start": case(
        beside, "shares its memory with fc.weight", overlaps
    ),
}


def in_place(_part: Any, features: Tensor, logits: Tensor) -> Tensor:
    features.mul_(1.0)
    return logits


def updates(norm: nn.BatchNorm1d, features: Tensor) -> None:
    F.batch_norm(features, norm.running_mean, norm.running_var, training=True)


def resets_flag(built: Any, features: Tensor, logits: Tensor) -> Tensor:
    """Read a flag that the branch has set, and remove it."""
    built.aux(features)
    return logits if vars(built).pop("ran", False) else 2 * logits


def normed(built: Any, features: Tensor, _logits: Tensor) -> Tensor:
    """Normalize the features after the branch has run."""
    built.aux(torch.cat([features, -features]))
    logits: Tensor = built.fc(built.norm(features))
    return logits


# The branch changes something that the classifier reads
EFFECTS: dict[str, Row] = {
    "in place": case(first, INSIDE, with_effect(in_place)),
    "in place, without tensors of its own": case(first, INSIDE, branch(Shift)),
    "a flag of the network that it resets": right(
        resets_flag, owned(lambda n, _x: setattr(n, "ran", True))
    ),
    "batch statistics of another layer": case(
        normed,
        "the eval graph writes to",
        owned(lambda n, x: updates(n.norm, x), norm=lambda: nn.BatchNorm1d(WIDTH)),
    ),
}


# A value of the branch becomes a Python value
PYTHON: dict[str, Row] = {
    "item": right(lambda n, f, y: y * (1 + 0 * n.aux(f).sum().item())),
    "tolist": case(
        lambda n, f, y: y * (1 + 0 * n.aux(f).tolist()[0][0]), "fixes the size", batch=5
    ),
}


# The branch is not needed
RIGHT: dict[str, Row] = {
    "a pair": right(beside),
    "a weight that is stored beside a kept one, which is registered later": right(
        beside, stored_beside, registered_last
    ),
    "a layer without tensors under two names": right(
        lambda n, f, y: (n.fc(n.act(f)), n.aux(f)),
        puts(act=nn.ReLU),
        lambda n: setattr(n, "aux", nn.Sequential(n.act, nn.Linear(WIDTH, CLASSES))),
    ),
}
