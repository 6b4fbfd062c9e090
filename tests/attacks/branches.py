"""Networks whose branch runs in eval mode: some let it affect the output, the others only seem to.

All have the parts `conv`, `fc` and `aux`, and return the logits, or these beside those of
`aux`.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, WIDTH = 4, 8
Answer = Callable[[Any, Tensor, Tensor], Any]


class Branched(nn.Module):
    """A convolution and a classifier over mean features, with a branch that is called in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, CLASSES)
        self.aux: Any = nn.Linear(WIDTH, CLASSES)
        self.prepare()

    def prepare(self) -> None:
        """Add what a subclass needs."""

    def forward(self, images: Tensor) -> Any:
        features = self.conv(images).relu().mean((2, 3))
        return self.answer(features, self.fc(features))

    def answer(self, features: Tensor, logits: Tensor) -> Any:
        return logits, self.aux(features)


class Case(NamedTuple):
    """A network, what *parts* to remove from it, and the message of the refusal; empty: it is exported."""

    network: type[Branched]
    message: str = ""
    parts: tuple[str, ...] = ("aux",)


def case(
    answer: Answer,
    message: str = "",
    prepare: Callable[[Any], object] | None = None,
    *parts: str,
) -> Case:
    members = {"answer": answer, "prepare": prepare or Branched.prepare}
    return Case(type("Network", (Branched,), members), message, parts or ("aux",))


def puts(**values: Callable[[], Any]) -> Callable[[Any], None]:
    """Set attributes of a network."""

    def prepare(network: Any) -> None:
        for name, make in values.items():
            setattr(network, name, make())

    return prepare


def replaces(network: Any, part: nn.Module) -> None:
    network.aux = part


class Branch(nn.Module):
    """A linear branch that computes something beside its logits."""

    def __init__(
        self, effect: Callable[[Any, Tensor, Tensor], Any] = lambda _part, _x, y: y
    ) -> None:
        super().__init__()
        self.head, self.effect = nn.Linear(WIDTH, CLASSES), effect
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


def branch(effect: Callable[[Any, Tensor, Tensor], Any]) -> Callable[[Any], None]:
    return lambda network: replaces(network, Branch(effect))


def owned(
    effect: Callable[[Any, Tensor], object], **values: Callable[[], Any]
) -> Callable[[Any], None]:
    """Add a branch with an *effect* on the network that holds it, and set attributes of this network."""

    def prepare(network: Any) -> None:
        replaces(network, Branch(lambda part, x, y: (effect(part.owner[0], x), y)[1]))
        network.aux.owner = [network]
        puts(**values)(network)

    return prepare


def beside(network: Any, features: Tensor, logits: Tensor) -> Any:
    """Return the logits, and what the branch returns."""
    return logits, network.aux(features)


def calls_first(network: Any, features: Tensor, _logits: Tensor) -> Any:
    """Call the branch before the classifier."""
    branched = network.aux(features)
    return network.fc(features), branched


NEEDED = r"^training_only: the output of the trained network depends on (aux|gate)"
DRAWN = r"depends on values in aux: with random values there, the network is another one"
OTHER = r"the (trained|detached) network is not the (trained|detached|plain) one"
STATE = r"changes while the trained network runs|writes to .+ while it runs|cannot be captured"
READS = r"Python code of the trained network reads tensors"

VALUES: dict[str, Case] = {  # the output depends on a tensor of the branch, and hides that
    "times zero": case(lambda n, f, y: y + 0 * n.aux(f), NEEDED),
    "where": case(lambda n, f, y: torch.where(n.aux(f).isnan(), y, y + 0 * n.aux(f)), NEEDED),
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
    "a method": case(
        lambda n, f, y: y + 0 * n.aux.method(f), NEEDED, lambda n: replaces(n, Branch())
    ),
    "a property": case(
        lambda n, f, y: y + 0 * n.aux.scale, NEEDED, lambda n: replaces(n, Branch())
    ),
    "a bound method": case(
        lambda n, f, y: y + 0 * n.call(f), NEEDED, lambda n: setattr(n, "call", n.aux.forward)
    ),
    "a tensor that is no part": case(
        lambda n, f, y: y + 0 * n.gate.sum(),
        NEEDED,
        puts(gate=lambda: nn.Parameter(torch.ones(3))),
        "gate",
    ),
    "a number that it returns": case(
        lambda n, f, y: y * n.aux(f)[1],
        r"depends on a removed part: .* NaN or infinite; keep",
        branch(lambda _part, _x, y: (y, 0.5)),
    ),
    "what it returns unchanged": case(
        lambda n, f, y: n.fc(n.aux(f)),
        OTHER + "|not finite|NaN",
        branch(lambda _part, x, _y: x),
    ),
    "the exit that is chosen": case(lambda n, f, y: (n.aux(f), y), NEEDED),
}


def aliases(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Give a network an attribute `alias` that shares memory with its branch, outside of torch's tables."""

    def prepare(network: Any) -> None:
        network.alias = [make(network)]

    return prepare


GLOBAL = SimpleNamespace(weight=torch.zeros(()), flag=0, seen=[])


def shares_globally(network: Any) -> None:
    GLOBAL.weight = network.aux.weight.data


def ties(network: Any) -> None:
    network.fc.weight = network.aux.weight


ALIASES: dict[str, Case] = {
    "a view of its weight": case(
        lambda n, f, y: y + f @ n.alias[0].t(), DRAWN, aliases(lambda n: n.aux.weight.data)
    ),
    "a slice of its weight": case(
        lambda n, f, y: y + n.alias[0], DRAWN, aliases(lambda n: n.aux.weight.data[:, 0])
    ),
    "an array over its weight": case(
        lambda n, f, y: y + f @ torch.from_numpy(n.alias[0]).t(),
        DRAWN,
        aliases(lambda n: n.aux.weight.detach().numpy()),
    ),
    "a global variable": case(
        lambda n, f, y: y + f @ GLOBAL.weight.t(), DRAWN, shares_globally
    ),
    "a module in a list": case(
        lambda n, f, y: y + 0 * n.alias[0](f), NEEDED, aliases(lambda n: n.aux)
    ),
    "a module under a second name": case(
        lambda n, f, y: y + 0 * n.other(f),
        "shares its memory with other",
        lambda n: setattr(n, "other", n.aux),
    ),
    "a weight of the classifier": case(beside, "shares its memory with fc.weight", ties),
}


def hooked(hook: Callable[..., Any]) -> Callable[[Any], None]:
    return lambda network: network.aux.register_forward_hook(hook)


def stores(network: Any) -> None:
    network.stored = network.aux.stored = []
    network.aux.register_forward_hook(lambda part, _inputs, output: part.stored.append(output))


def reads_stored(network: Any, features: Tensor, logits: Tensor) -> Any:
    network.stored.clear()
    network.aux(features)
    return logits + 0 * network.stored[0]


EFFECTS: dict[str, Case] = {  # the branch changes something that the classifier reads
    "in place": case(
        calls_first,
        OTHER + "|operations of aux",
        branch(lambda _part, x, y: (x.mul_(1.0), y)[1]),
    ),
    "in place, without tensors of its own": case(
        calls_first, OTHER + "|operations of aux", lambda n: replaces(n, Shift())
    ),
    "in place, by a method": case(
        lambda n, f, y: (n.aux.shift(f), n.fc(f))[1], OTHER, lambda n: replaces(n, Shift())
    ),
    "in place, through a view": case(
        calls_first,
        OTHER + "|operations of aux",
        branch(lambda _part, x, y: (x[:, :1].mul_(1.0), y)[1]),
    ),
    "in place, by a hook": case(
        calls_first,
        OTHER + "|operations of aux",
        hooked(lambda _part, inputs, _output: inputs[0].mul_(1.0)),
    ),
    "a hook that stores the result": case(reads_stored, NEEDED + "|changes while", stores),
    "a list that it gets": case(
        lambda n, f, y: (found := [y], n.aux((f, found)), found[-1])[2],
        r"operations of aux|" + OTHER,
        lambda n: replaces(n, Appends()),
    ),
    "a dict that it gets": case(
        lambda n, f, y: (found := {"x": y}, n.aux((f, found)), found["x"])[2],
        r"operations of aux|" + OTHER,
        lambda n: replaces(n, Replaces()),
    ),
    "a buffer": case(
        lambda n, f, y: (n.aux(f), y + n.norm.running_mean.sum())[1],
        STATE,
        owned(
            lambda n, x: n.norm.running_mean.add_(0 * x.sum()),
            norm=lambda: nn.BatchNorm1d(WIDTH),
        ),
    ),
    "a global variable": case(
        lambda n, f, y: (n.aux(f), y + 0 * GLOBAL.seen[-1])[1],
        "depends on|changes while|cannot be captured",
        branch(lambda _part, _x, y: (GLOBAL.seen.append(y), y)[1]),
    ),
    "a flag of the network": case(
        lambda n, f, y: (n.aux(f), y * (1.0 if n.aux_ran else 2.0))[1],
        OTHER + "|changes while",
        owned(lambda n, _x: setattr(n, "aux_ran", True), aux_ran=bool),
    ),
    "a flag of the network that it resets": case(
        lambda n, f, y: (n.aux(f), y * (1.0 if vars(n).pop("aux_ran", False) else 2.0))[1],
        OTHER + "|changes while",
        owned(lambda n, _x: setattr(n, "aux_ran", True)),
    ),
    "a global flag": case(
        lambda n, f, y: (setattr(GLOBAL, "flag", 0), n.aux(f), y * (1.0 + GLOBAL.flag))[2],
        OTHER + "|changes while",
        branch(lambda _part, _x, y: (setattr(GLOBAL, "flag", 1), y)[1]),
    ),
    "the mode of another layer": case(
        lambda n, f, y: (n.aux(f), n.fc(n.norm(f)))[1],
        STATE + "|fails for 1 images",
        owned(lambda n, _x: n.norm.train(), norm=lambda: nn.BatchNorm1d(WIDTH)),
    ),
    "batch statistics of another layer": case(
        lambda n, f, y: (n.aux(torch.cat([f, -f])), n.fc(n.norm(f)))[1],
        STATE + "|other logits in a second run",
        owned(lambda n, x: updates(n.norm, x), norm=lambda: nn.BatchNorm1d(WIDTH)),
    ),
    "batch statistics of its own": case(
        lambda n, f, y: (n.aux(f), y)[1],
        "train mode|" + STATE,
        lambda n: replaces(n, AlwaysTrains(WIDTH)),
    ),
    "the number of its runs": case(
        lambda n, f, y: (n.aux(f), y if n.runs < 600 else -y)[1],
        STATE,
        owned(lambda n, _x: setattr(n, "runs", n.runs + 1), runs=int),
    ),
}


class Appends(nn.Module):
    """Appends its logits to a list, after those of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, given: tuple[Tensor, list[Tensor]]) -> None:
        given[1].append(given[1][0] * 1.0)


class Replaces(Appends):
    """Replaces the logits of the network in a dict."""

    def forward(self, given: Any) -> None:
        given[1]["x"] = given[1]["x"] * 1.0


class AlwaysTrains(nn.BatchNorm1d):
    """Stays in train mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train()


def updates(norm: nn.BatchNorm1d, features: Tensor) -> None:
    F.batch_norm(features, norm.running_mean, norm.running_var, training=True)


def tried(read: Callable[[Any, Tensor], bool]) -> Answer:
    """Choose the logits by a value of the branch, or without it if torch.export raises an error."""

    def answer(network: Any, features: Tensor, logits: Tensor) -> Any:
        with contextlib.suppress(Exception):
            if read(network, features):
                return logits * 2
        return logits

    return answer


def lists(count: int = 2) -> Callable[[Any], None]:
    return lambda n: replaces(n, nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(count)))


class NamedBranch(Branch):
    """Holds a number."""

    weight_of_loss = 0.4


PYTHON: dict[str, Case] = {  # a value of the branch becomes a Python value
    "item": case(
        lambda n, f, y: y * (1 + 0 * n.aux(f).sum().item()), READS + "|cannot be captured|fails"
    ),
    "tolist": case(
        lambda n, f, y: y * (1 + 0 * n.aux(f).tolist()[0][0]),
        READS + "|cannot be captured|fails",
    ),
    "float behind try": case(tried(lambda n, f: float(n.aux(f).mean()) > 9), READS),
    "its text": case(tried(lambda n, f: "nan" in str(n.aux(f))), READS),
    "a branch on its result": case(tried(lambda n, f: bool((n.aux(f) > 1e9).any())), READS),
    "a branch on its NaN": case(tried(lambda n, f: bool(n.aux(f).isnan().any())), READS),
    "cond": case(
        lambda n, f, y: torch.cond(
            n.aux(f).sum() > 1e9, lambda x: x * 2, lambda x: x * 1, (y,)
        ),
        "no control flow|" + READS,
    ),
    "the length of a list": case(
        lambda n, f, y: y * len(n.aux) + 0,
        "reads the length of aux, .* try training_only='aux",
        lists(),
    ),
    "an attribute": case(
        lambda n, f, y: y * n.aux.weight_of_loss,
        "reads weight_of_loss of aux",
        lambda n: replaces(n, NamedBranch()),
    ),
    "a size of a layer": case(
        lambda n, f, y: y * n.aux.out_features, "reads out_features of aux"
    ),
    "the number of its weights": case(lambda n, f, y: y * len([*n.aux.parameters()]), OTHER),
    "its mode": case(
        lambda n, f, y: (n.aux(f), y * (2.0 if n.aux.training else 1.0))[1],
        OTHER + "|train mode|" + STATE,
        lambda n: replaces(n, StaysInTrainMode()),
    ),
    "its class": case(
        lambda n, f, y: y * (1.0 if isinstance(n.aux, nn.Linear) else 2.0), OTHER
    ),
    "whether it computes NaN": case(
        lambda n, f, y: y * (1.0 if type(n.aux).__module__.startswith("torch.") else 2.0), OTHER
    ),
    "what its name is": case(
        lambda n, f, y: (
            y * (1.0 if type(n.aux).__name__ == "Linear" else 2.0) + 0 * n.aux(f).sum()
        ),
        NEEDED,
    ),
}


class StaysInTrainMode(Branch):
    """Ignores `eval`."""

    def train(self, mode: bool = True) -> Any:
        return super().train()


class Output(dict[str, Any]):
    """A dict with attributes, as libraries return it."""


class Bag:
    """Logits and a number."""

    def __init__(self, logits: Tensor, number: int) -> None:
        self.logits, self.number = logits, number


def exits(network: Any, features: Tensor, logits: Tensor) -> Any:
    return [logits, *(head(features) for head in network.aux)]


def yields(_part: Any, _x: Tensor, y: Tensor) -> Iterator[Tensor]:
    yield y


RIGHT: dict[str, Case] = {  # the branch is not needed
    "a pair": case(beside),
    "a list of exits": case(exits, "", lists()),
    "a dict of heads": case(
        lambda n, f, y: (y, {name: head(f) for name, head in n.aux.items()}),
        "",
        lambda n: replaces(n, nn.ModuleDict({"early": nn.Linear(WIDTH, CLASSES)})),
    ),
    "parts of a list by position and by slice": case(
        lambda n, f, y: (y, n.aux[0](f), [head(f) for head in n.aux[1:]], [*n.aux][1](f)),
        "",
        lists(),
    ),
    "nested results": case(
        lambda n, f, y: (y, n.aux(f)["x"][0] * 2),
        "",
        branch(lambda _part, x, y: {"x": [y, None], "size": x.shape[0], "name": "aux"}),
    ),
    "an object": case(
        lambda n, f, y: (y, n.aux(f).logits), "", branch(lambda _part, _x, y: Bag(y, 3))
    ),
    "a number that it returns": case(
        lambda n, f, y: (y, n.aux(f)[0] * n.aux(f)[1]),
        "",
        branch(lambda _part, _x, y: (y, 0.5)),
    ),
    "a result that is changed in place": case(lambda n, f, y: (y, n.aux(f).relu_())),
    "two views": case(
        lambda n, f, y: (y, n.aux(torch.cat([f, -f])).chunk(2)),
    ),
    "a loss": case(
        lambda n, f, y: (
            y,
            F.kl_div(n.aux(f).log_softmax(1), y.softmax(1), reduction="batchmean"),
        )
    ),
    "a branch with another type": case(lambda n, f, y: (y, n.aux(f).double().float().mean())),
    "a method": case(lambda n, f, y: (y, n.aux.method(f)), "", lambda n: replaces(n, Branch())),
    "a weight as an operand": case(lambda n, f, y: (y, F.linear(f, n.aux.weight))),
    "a removed tensor": case(
        lambda n, f, y: (y, y * n.gate.sum()),
        "",
        puts(gate=lambda: nn.Parameter(torch.ones(3))),
        "gate",
    ),
    "dropout of the branch": case(lambda n, f, y: (y, F.dropout(n.aux(f), 0.5, training=True))),
    "no call": case(lambda n, f, y: y if n.aux is not None else -y),
    "a truth value of a list": case(
        lambda n, f, y: (y, n.aux[0](f)) if n.aux else y, "", lists()
    ),
    "a layer without tensors under two names": case(
        lambda n, f, y: (n.fc(n.act(f)), n.aux(f)),
        "",
        lambda n: (
            setattr(n, "act", nn.ReLU()),
            replaces(n, nn.Sequential(n.act, nn.Linear(WIDTH, CLASSES))),
        ),
    ),
}

CANNOT: dict[str, Case] = {  # the branch is not needed, but it cannot have a stub
    "a generator": case(
        lambda n, f, y: (y, list(n.aux(f))), "aux returns a generator", branch(yields)
    ),
    "a function": case(
        lambda n, f, y: (y, n.aux(f)()),
        "aux returns a function",
        branch(lambda _part, _x, y: lambda: y),
    ),
}
