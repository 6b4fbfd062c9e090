"""Networks whose branch runs in eval mode: some let it affect the output, the others only seem to.

They return the logits, or these beside those of the branch `aux`, which is removed.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
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

NEEDED = r"^training_only: the outputs depend on (aux|gate)"
DRAWN = r"depend on aux.weight, which is removed|while aux has other values, the network gives"
STATE = (
    r"graph writes to|writes to .+ while it runs|cannot be captured|uses what an earlier run"
)
INSIDE = r"^training_only: the outputs depend on operations of aux"


def case(
    answer: Answer, refused: str, *changes: Change, part: str = "aux", batch: int | None = None
) -> Row:
    """Plant a network with another *answer*, from which *part* is removed."""
    return Row(network(answer, *changes), refused, (part,), batch=batch)


def right(answer: Answer, *changes: Change, part: str = "aux") -> Row:
    """Define a network whose *answer* does not need *part*."""
    return Row(network(answer, *changes), "", (part,))


def branch(part: Callable[[], nn.Module]) -> Change:
    return lambda built: setattr(built, "aux", part()) if built.aux is not None else None


class Branch(nn.Module):
    """A linear branch that computes something beside its logits."""

    weight_of_loss = 0.4

    def __init__(
        self, effect: Callable[[Any, Tensor, Tensor], Any] = lambda _part, _x, y: y
    ) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.effect = effect
        self.head_twice = [self.head]

    def forward(self, features: Tensor) -> Any:
        return self.effect(self, features, self.head(features))

    def method(self, features: Tensor) -> Any:
        """Compute the logits under another name."""
        return self.head(features)

    @property
    def scale(self) -> Tensor:
        """A number that the weights give."""
        return self.head.weight.mean()


class Shift(nn.Module):
    """Has no tensors; changes what it gets in place."""

    def forward(self, features: Tensor) -> None:
        features.mul_(1.0)

    def shift(self, features: Tensor) -> None:
        """Do the same under another name."""
        features.mul_(1.0)


class Appends(nn.Module):
    """Appends its logits to a list, after those of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, results: list[Tensor]) -> None:
        results.append(results[0] * 1.0)


class Replaces(Appends):
    """Replaces the logits of the network in a dict."""

    def forward(self, results: Any) -> None:
        results["x"] = results["x"] * 1.0


class AlwaysTrains(nn.BatchNorm1d):
    """Stays in train mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train()


class StaysInTrainMode(Branch):
    """Ignores `eval`."""

    def train(self, mode: bool = True) -> Any:
        return super().train()


class Bag:
    """Logits and a number."""

    def __init__(self, logits: Tensor, number: int) -> None:
        self.logits = logits
        self.number = number


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


def alias(make: Callable[[Any], Any]) -> Change:
    """Give a network an attribute `alias` that shares memory with its branch, outside of torch's tables."""
    return lambda built: setattr(built, "alias", [make(built)])


def several(count: int = 2) -> Change:
    return branch(lambda: nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(count)))


def hooked(hook: Callable[..., Any]) -> Change:
    return lambda built: built.aux.register_forward_hook(hook)


def gate() -> Change:
    return puts(gate=lambda: nn.Parameter(torch.ones(3)))


def ties(built: Any) -> None:
    built.fc.weight = built.aux.weight


def beside(built: Any, features: Tensor, logits: Tensor) -> Any:
    """Return the logits, and what the branch returns."""
    return logits, built.aux(features)


def first(built: Any, features: Tensor, _logits: Tensor) -> Any:
    """Call the branch before the classifier."""
    branched = built.aux(features)
    return built.fc(features), branched


def then(effect: Callable[[Any, Tensor, Tensor], object], answer: Answer) -> Answer:
    """Return a function that has an *effect*, then gives its *answer*."""

    def both(built: Any, features: Tensor, logits: Tensor) -> Any:
        effect(built, features, logits)
        return answer(built, features, logits)

    return both


def calls(built: Any, features: Tensor, _logits: Tensor) -> None:
    built.aux(features)


def with_branch(
    test: Callable[[Tensor], Any], otherwise: Answer = lambda _, _f, y: y
) -> Answer:
    """Return a function that adds nothing of the branch if *test* holds for the features."""

    def answer(built: Any, features: Tensor, logits: Tensor) -> Any:
        if test(features):
            return logits + 0 * built.aux(features)
        return otherwise(built, features, logits)

    return answer


VALUES: dict[str, Row] = {  # the output depends on a tensor of the branch, and hides that
    "times zero": case(lambda n, f, y: y + 0 * n.aux(f), NEEDED),
    "where": case(lambda n, f, y: torch.where(n.aux(f).isnan(), y, y + 0 * n.aux(f)), NEEDED),
    "chosen never": case(lambda n, f, y: torch.where(f.mean() > 1e9, n.aux(f), y), NEEDED),
    "nan_to_num": case(lambda n, f, y: y + 0 * n.aux(f).nan_to_num(), NEEDED),
    "fmax, which ignores NaN": case(lambda n, f, y: torch.fmax(y, n.aux(f) - 1e9), NEEDED),
    "a comparison": case(lambda n, f, y: y + 0 * (n.aux(f) > 0), NEEDED),
    "integers": case(lambda n, f, y: y + 0 * n.aux(f).int(), NEEDED),
    "whether it is NaN": case(lambda n, f, y: y + n.aux(f).isnan(), NEEDED),
    "a position": case(lambda n, f, y: y + 0 * n.aux(f).argmax(1, keepdim=True), NEEDED),
    "a product with zero as a mask": case(
        lambda n, f, y: y.masked_fill(n.aux(f).isinf(), 0.0), NEEDED
    ),
    "its weight": case(lambda n, f, y: y + 0 * F.linear(f, n.aux.weight), NEEDED),
    "all its weights": case(
        lambda n, f, y: y + 0 * sum(p.sum() for p in n.aux.parameters()), NEEDED
    ),
    "a copy of its weight": case(
        lambda n, f, y: y + 0 * n.aux.weight.detach().clone().sum(), NEEDED
    ),
    "a method": case(lambda n, f, y: y + 0 * n.aux.method(f), NEEDED, branch(Branch)),
    "a property": case(lambda n, f, y: y + 0 * n.aux.scale, NEEDED, branch(Branch)),
    "a bound method": case(
        lambda n, f, y: y + 0 * n.call(f),
        NEEDED,
        lambda n: setattr(n, "call", n.aux.forward),
    ),
    "a tensor that is no part": case(
        lambda n, f, y: y + 0 * n.gate.sum(), NEEDED, gate(), part="gate"
    ),
    "a number that it returns": right(
        lambda n, f, y: y * n.aux(f)[1], with_effect(lambda _part, _x, y: (y, 0.5))
    ),
    "what it returns unchanged": right(
        lambda n, f, y: n.fc(n.aux(f)), with_effect(lambda _part, x, _y: x)
    ),
    "the exit that is chosen": case(lambda n, f, y: (n.aux(f), y), NEEDED),
    "only with one image": case(with_branch(lambda f: f.shape[0] == 1), NEEDED),
    "only with three images": case(
        with_branch(lambda f: f.shape[0] == 3), "batch sizes differently|" + NEEDED, batch=5
    ),
    "by a value": case(
        with_branch(lambda f: f.mean() > 1e9), "its code depends on values of the image"
    ),
    "of a branch that is not listed": Row(HiddenBranch, NEEDED, ("aux",)),
    "in plain runs only": case(
        with_branch(lambda _: not torch.compiler.is_compiling()),
        NEEDED,
    ),
}

GLOBAL = SimpleNamespace(weight=torch.zeros(()), flag=0, seen=[])


def shares_globally(built: Any) -> None:
    GLOBAL.weight = built.aux.weight.data


def overlaps(built: Any) -> None:
    """Give a kept and a removed weight two storages over one array, with different starts."""
    kept = built.fc.weight
    removed = built.aux.weight
    array = np.zeros(2 * kept.numel(), np.float32)
    start = kept.numel() - 1
    kept.data = torch.from_numpy(array[: kept.numel()]).view_as(kept)
    removed.data = torch.from_numpy(array[start : start + removed.numel()]).view_as(removed)


def shares_transposed(built: Any) -> None:
    """Share memory in a layout that an export may convert; copying would hide that."""
    built.fc.weight = nn.Parameter(built.fc.weight.detach().t().contiguous().t())
    built.aux.weight.data = built.fc.weight.data


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


def reads_memory(*changes: Change) -> nn.Module:
    """Build a network that reads the memory of its branch in Python, which no graph shows."""

    def answer(built: Any, _features: Tensor, logits: Tensor) -> Tensor:
        array, before = built.numbers
        return logits if (array == before).all() else logits + 1e-9

    built = trained(network(answer, *changes)())
    array = built.aux.weight.detach().numpy()
    built.numbers = (array, array.copy())
    return built


ALIASES: dict[str, Row] = {
    "a view of its weight": case(
        lambda n, f, y: y + f @ n.alias[0].t(), DRAWN, alias(lambda n: n.aux.weight.data)
    ),
    "a slice of its weight": case(
        lambda n, f, y: y + n.alias[0], DRAWN, alias(lambda n: n.aux.weight.data[:, 0])
    ),
    "an array over its weight": case(
        lambda n, f, y: y + f @ torch.from_numpy(n.alias[0]).t(),
        DRAWN,
        alias(lambda n: n.aux.weight.detach().numpy()),
    ),
    "a number of its memory, read in Python": Row(reads_memory, "", ("aux",)),
    "a view of its weight, stored beside a kept one": case(
        lambda n, f, y: y + f @ n.alias[0].t(),
        DRAWN,
        stored_beside,
        alias(lambda n: n.aux.weight.data),
    ),
    "a view of its weight, stored beside a kept one that is registered later": case(
        lambda n, f, y: y + f @ n.alias[0].t(),
        DRAWN,
        stored_beside,
        registered_last,
        alias(lambda n: n.aux.weight.data),
    ),
    "a number of its memory, stored beside a kept one": Row(
        lambda: reads_memory(stored_beside), "", ("aux",)
    ),
    "a global variable": case(
        lambda n, f, y: y + f @ GLOBAL.weight.t(), DRAWN, shares_globally
    ),
    "a module in a list": case(
        lambda n, f, y: y + 0 * n.alias[0](f), NEEDED, alias(lambda n: n.aux)
    ),
    "a module under a second name": case(
        lambda n, f, y: y + 0 * n.other(f),
        "shares its memory with other",
        lambda n: setattr(n, "other", n.aux),
    ),
    "a weight of the classifier": case(beside, "shares its memory with fc.weight", ties),
    "a weight of the classifier in another layout": case(
        beside, "shares its memory with", shares_transposed
    ),
    "overlapping memory with another start": case(
        beside, "shares its memory with fc.weight", overlaps
    ),
}


def stores(built: Any) -> None:
    built.stored = built.aux.stored = []
    built.aux.register_forward_hook(lambda part, _inputs, output: part.stored.append(output))


def reads_stored(built: Any, features: Tensor, logits: Tensor) -> Any:
    built.stored.clear()
    built.aux(features)
    return logits + 0 * built.stored[0]


def appended(built: Any, _features: Tensor, logits: Tensor) -> Tensor:
    results = [logits]
    built.aux(results)
    return results[-1]


def replaced(built: Any, _features: Tensor, logits: Tensor) -> Tensor:
    results = {"x": logits}
    built.aux(results)
    return results["x"]


def flag(value: int) -> None:
    GLOBAL.flag = value


def in_place(change: Callable[[Tensor], object]) -> Change:
    def effect(_part: Any, features: Tensor, logits: Tensor) -> Tensor:
        change(features)
        return logits

    return with_effect(effect)


def updates(norm: nn.BatchNorm1d, features: Tensor) -> None:
    F.batch_norm(features, norm.running_mean, norm.running_var, training=True)


def sets(built: Any, flag: str, value: Any = True) -> None:
    setattr(built, flag, value)


EFFECTS: dict[str, Row] = {  # the branch changes something that the classifier reads
    "in place": case(first, INSIDE, in_place(lambda x: x.mul_(1.0))),
    "in place, without tensors of its own": case(first, INSIDE, branch(Shift)),
    "in place, by a method": right(
        then(lambda n, f, y: n.aux.shift(f), lambda n, f, y: n.fc(f)), branch(Shift)
    ),
    "in place, through a view": case(first, INSIDE, in_place(lambda x: x[:, :1].mul_(1.0))),
    "in place, by a hook": case(
        first, INSIDE, hooked(lambda _part, inputs, _output: inputs[0].mul_(1.0))
    ),
    "a hook that stores the result": case(reads_stored, NEEDED, stores),
    "a list that it gets": case(appended, INSIDE, branch(Appends)),
    "a dict that it gets": case(replaced, INSIDE, branch(Replaces)),
    "a buffer": case(
        then(calls, lambda n, f, y: y + n.norm.running_mean.sum()),
        STATE,
        owned(
            lambda n, x: n.norm.running_mean.add_(0 * x.sum()),
            norm=lambda: nn.BatchNorm1d(WIDTH),
        ),
    ),
    "a global variable": case(
        then(calls, lambda n, f, y: y + 0 * GLOBAL.seen[-1]),
        NEEDED,
        with_effect(lambda _part, _x, y: (GLOBAL.seen.append(y), y)[1]),
    ),
    "a flag of the network": right(
        then(calls, lambda n, f, y: y * (1.0 if n.ran else 2.0)),
        owned(lambda n, _x: sets(n, "ran"), ran=bool),
    ),
    "a flag of the network that it resets": right(
        then(calls, lambda n, f, y: y * (1.0 if vars(n).pop("ran", False) else 2.0)),
        owned(lambda n, _x: sets(n, "ran")),
    ),
    "a global flag": right(
        then(
            lambda n, f, y: (flag(0), n.aux(f)),
            lambda n, f, y: y * (1.0 + GLOBAL.flag),
        ),
        with_effect(lambda _part, _x, y: (flag(1), y)[1]),
    ),
    "the mode of another layer": case(
        then(calls, lambda n, f, y: n.fc(n.norm(f))),
        STATE + "|fails for",
        owned(lambda n, _x: n.norm.train(), norm=lambda: nn.BatchNorm1d(WIDTH)),
    ),
    "batch statistics of another layer": case(
        then(
            lambda n, f, y: n.aux(torch.cat([f, -f])),
            lambda n, f, y: n.fc(n.norm(f)),
        ),
        STATE,
        owned(lambda n, x: updates(n.norm, x), norm=lambda: nn.BatchNorm1d(WIDTH)),
    ),
    "batch statistics of its own": case(
        then(calls, lambda n, f, y: y),
        STATE + "|Expected more than 1 value per channel",
        branch(lambda: AlwaysTrains(WIDTH)),
    ),
    "the number of its runs": right(
        then(calls, lambda n, f, y: y if n.runs < 200 else -y),
        owned(lambda n, _x: sets(n, "runs", n.runs + 1), runs=int),
    ),
}


def tried(read: Callable[[Any, Tensor], bool]) -> Answer:
    """Choose the logits by a value of the branch, or without it if torch.export raises an error."""

    def answer(built: Any, features: Tensor, logits: Tensor) -> Any:
        with contextlib.suppress(Exception):
            if read(built, features):
                return logits * 2
        return logits

    return answer


def by_name(built: Any, features: Tensor, logits: Tensor) -> Tensor:
    factor = 1.0 if type(built.aux).__name__ == "Linear" else 2.0
    scaled: Tensor = logits * factor + 0 * built.aux(features).sum()
    return scaled


PYTHON: dict[str, Row] = {  # a value of the branch becomes a Python value
    "item": right(lambda n, f, y: y * (1 + 0 * n.aux(f).sum().item())),
    "tolist": Row(
        network(lambda n, f, y: y * (1 + 0 * n.aux(f).tolist()[0][0])),
        "fixes the size",
        ("aux",),
        batch=5,
    ),
    "float behind try": right(tried(lambda n, f: float(n.aux(f).mean()) > 9)),
    "its text": right(tried(lambda n, f: "nan" in str(n.aux(f)))),
    "a branch on its result": case(tried(lambda n, f: bool((n.aux(f) > 1e9).any())), NEEDED),
    "a branch on its NaN": case(tried(lambda n, f: bool(n.aux(f).isnan().any())), NEEDED),
    "cond": case(
        lambda n, f, y: torch.cond(
            n.aux(f).sum() > 1e9, lambda x: x * 2, lambda x: x * 1, (y,)
        ),
        "no control flow",
    ),
    "the length of a list": right(lambda n, f, y: y * len(n.aux) + 0, several()),
    "an attribute": right(lambda n, f, y: y * n.aux.weight_of_loss, branch(Branch)),
    "a size of a layer": right(lambda n, f, y: y * n.aux.out_features),
    "the number of its weights": right(lambda n, f, y: y * len([*n.aux.parameters()])),
    "its mode": right(
        then(calls, lambda n, f, y: y * (2.0 if n.aux.training else 1.0)),
        branch(StaysInTrainMode),
    ),
    "its class": right(lambda n, f, y: y * (1.0 if isinstance(n.aux, nn.Linear) else 2.0)),
    "the module of its class": right(
        lambda n, f, y: y * (1.0 if type(n.aux).__module__.startswith("torch.") else 2.0)
    ),
    "what its name is": case(by_name, NEEDED),
}


def yields(_part: Any, _x: Tensor, y: Tensor) -> Iterator[Tensor]:
    yield y


SHARED = "a layer without tensors under two names"
RIGHT: dict[str, Row] = {  # the branch is not needed
    "a pair": right(beside),
    "a list of exits": right(lambda n, f, y: [y, *(head(f) for head in n.aux)], several()),
    "a dict of heads": right(
        lambda n, f, y: (y, {name: head(f) for name, head in n.aux.items()}),
        branch(lambda: nn.ModuleDict({"early": nn.Linear(WIDTH, CLASSES)})),
    ),
    "parts of a list by position and by slice": right(
        lambda n, f, y: (y, n.aux[0](f), [head(f) for head in n.aux[1:]], [*n.aux][1](f)),
        several(),
    ),
    "nested results": right(
        lambda n, f, y: (y, n.aux(f)["x"][0] * 2),
        with_effect(lambda _part, x, y: {"x": [y, None], "size": x.shape[0], "name": "aux"}),
    ),
    "an object": right(
        lambda n, f, y: (y, n.aux(f).logits), with_effect(lambda _part, _x, y: Bag(y, 3))
    ),
    "a number that it returns": right(
        lambda n, f, y: (y, n.aux(f)[0] * n.aux(f)[1]),
        with_effect(lambda _part, _x, y: (y, 0.5)),
    ),
    "a result that is changed in place": right(lambda n, f, y: (y, n.aux(f).relu_())),
    "two views": right(lambda n, f, y: (y, n.aux(torch.cat([f, -f])).chunk(2))),
    "a loss": right(
        lambda n, f, y: (
            y,
            F.kl_div(n.aux(f).log_softmax(1), y.softmax(1), reduction="batchmean"),
        )
    ),
    "a branch with another type": right(lambda n, f, y: (y, n.aux(f).double().float().mean())),
    "a method": right(lambda n, f, y: (y, n.aux.method(f)), branch(Branch)),
    "a weight as an operand": right(lambda n, f, y: (y, F.linear(f, n.aux.weight))),
    "a removed tensor": right(lambda n, f, y: (y, y * n.gate.sum()), gate(), part="gate"),
    "dropout of the branch": right(
        lambda n, f, y: (y, F.dropout(n.aux(f), 0.5, training=True))
    ),
    "a weight that is stored beside a kept one": right(beside, stored_beside),
    "a weight that is stored beside a kept one, which is registered later": right(
        beside, stored_beside, registered_last
    ),
    "no call": right(lambda n, f, y: y if n.aux is not None else -y),
    "a truth value of a list": right(
        lambda n, f, y: (y, n.aux[0](f)) if n.aux else y, several()
    ),
    SHARED: right(
        lambda n, f, y: (n.fc(n.act(f)), n.aux(f)),
        puts(act=nn.ReLU),
        lambda n: setattr(n, "aux", nn.Sequential(n.act, nn.Linear(WIDTH, CLASSES))),
    ),
    "a generator": right(lambda n, f, y: (y, list(n.aux(f))), with_effect(yields)),
    "a function": right(
        lambda n, f, y: (y, n.aux(f)()), with_effect(lambda _part, _x, y: lambda: y)
    ),
}
