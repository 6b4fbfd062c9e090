"""Networks whose graph hides what they compute, or is not that of the plain network; others only look so."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attacks.planted.network import (
    CLASSES,
    WIDTH,
    Change,
    Planted,
    Row,
    changed,
    limited,
    network,
    puts,
)
from tests.attacks.planted.state import closure


def without_branch(kind: type[Planted]) -> Callable[[], nn.Module]:
    return lambda: kind(branch=False)


COPIED = "custom backend"


class SetState(Planted):
    """A copy of it has scaled weights."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.no_grad():
            self.fc.bias.add_(1e-2)


def doubled(graph: Any, _inputs: Any) -> Callable[..., Any]:
    """Compile *graph* to what returns twice its outputs."""
    return lambda *inputs: tuple(x * 2 for x in graph(*inputs))


COPIES: dict[str, Row] = {
    "a backend of Module.compile": Row(changed(lambda n: n.compile(backend=doubled)), COPIED),
    "__setstate__ changes a weight": Row(SetState),
    "a backend of torch.compile": Row(
        lambda: torch.compile(Planted(), backend=doubled),
        COPIED,  # type: ignore[return-value]
    ),
}


def by_size(size: int, refused: str) -> Row:
    """Plant a network that limits its logits in batches of *size*."""
    kind = network(lambda n, f, y: limited(y) if f.shape[0] == size else y)
    return Row(kind, refused, batch=5)


SIZES: dict[str, Row] = {
    "the size is 3": by_size(3, "treats some batch sizes differently"),
    "the size is 1": by_size(1, "a plain run of the network gives other outputs"),
}


def transposed() -> Tensor:
    return torch.arange(float(WIDTH * CLASSES)).reshape(WIDTH, CLASSES).t() / 30


def in_bfloat16(built: Any, features: Tensor, _logits: Tensor) -> Tensor:
    weight = built.fc.weight.bfloat16()
    return F.linear(features.bfloat16(), weight, built.fc.bias.bfloat16()).float()


def with_default_type() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return Planted()


MEMORY: dict[str, Row] = {
    "as_strided on a transposed attribute": Row(
        network(
            lambda n, f, y: y + f @ torch.as_strided(n.table, (WIDTH, CLASSES), (CLASSES, 1)),
            puts(table=transposed),
        ),
        "reads memory with as_strided",
    ),
    "cond": Row(
        network(
            lambda n, f, y: torch.cond(y.sum() > 0, lambda x: x * 1, lambda x: x * 2, (y,))
        ),
        "a graph has no control flow",
    ),
    "bfloat16 in forward": Row(network(in_bfloat16), "bfloat16"),
    "a default type": Row(with_default_type, "set_default_dtype"),
    "a negated view": Row(
        changed(lambda n: setattr(n.fc, "weight", negated(n.fc.weight))),
        r"^fc\.weight is a negated view",
    ),
    "a weight without values": Row(
        changed(lambda n: n.fc.to("meta")), r"fc\.weight is a .* on meta"
    ),
}


def negated(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch._neg_view(-weight.detach()))


class Nested(Planted):
    """Holds layers in nested lists, where no state dict finds them."""

    def prepare(self) -> None:
        self.more = [[nn.Linear(WIDTH, WIDTH)]]

    def answer(self, features: Tensor, _logits: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.more[0][0](features))
        return logits


TABLE = torch.linspace(0, 1, 2 * WIDTH * CLASSES).reshape(2, WIDTH, CLASSES)
UNSTORED = "parameter or buffer"
IN_LIST = r"trainable tensor .* that is not a registered parameter"


def adds(
    table: Callable[[Any], Tensor], make: Callable[[], object] = lambda: None
) -> type[Planted]:
    """Define a network that adds a product with a *table*, which it may hold as *make* makes it."""
    return network(lambda n, f, y: y + f @ table(n), puts(table=make))


def rebuilt(kind: type[Planted], refused: str = "") -> Row:
    """Plant a *kind* of network that its builder builds again."""
    return Row(kind, refused, rebuild=kind)


@functools.lru_cache
def table_of(side: int) -> Tensor:
    return torch.linspace(0, side, WIDTH * CLASSES).reshape(WIDTH, CLASSES)


@functools.cache
def drawn_table() -> Tensor:
    return torch.rand(WIDTH, CLASSES)


CONSTANTS: dict[str, Row] = {
    "layers in nested lists": Row(Nested, IN_LIST),
    "a table that a function keeps": rebuilt(adds(lambda _: table_of(WIDTH)), UNSTORED),
    "random numbers that a function keeps": rebuilt(adds(lambda _: drawn_table()), UNSTORED),
    "a tensor that both networks hold": rebuilt(
        adds(lambda n: n.table[0], lambda: TABLE), UNSTORED
    ),
}


def hooked(make_hook: Callable[[Any], Any]) -> type[Planted]:
    """Define a network whose convolution has the hook that *make_hook* makes for it."""
    register: Change = lambda built: built.conv.register_forward_hook(make_hook(built))  # noqa: E731
    return network(lambda n, f, y: y, register)


def counting_hook(_network: Any) -> Any:
    count = closure()
    return lambda _module, _inputs, output: output if count() < 200 else -output


class RarelyDrops(nn.Dropout):
    """Is in train mode, and drops a value in ten million."""

    def __init__(self) -> None:
        super().__init__(1e-7)

    def train(self, mode: bool = True) -> Any:
        return super().train(True)


class OwnStatistics(nn.BatchNorm1d):
    """Normalizes by the images of the batch, also in eval mode."""

    def __init__(self) -> None:
        super().__init__(CLASSES, track_running_stats=False)


def part(make: Callable[[], nn.Module]) -> Change:
    return lambda built: built.add_module("part", make())


# Hooks and layers in train mode are not a reason to refuse; what they do here is.
ODD: dict[str, Row] = {
    "a hook that counts its calls": Row(hooked(counting_hook)),
    "a hook that reads the branch": Row(
        hooked(lambda n: lambda _m, _i, x: x + 0 * n.aux.weight.sum()),
        r"depend on aux.*forward hook on conv",
        ("aux",),
    ),
    "a dropout of a value in ten million": Row(
        network(lambda n, f, y: n.fc(n.part(f)), part(RarelyDrops)),
        r"draws random numbers.*in train mode",
    ),
    "statistics of the batch in eval mode": Row(
        network(lambda n, f, y: n.part(y), part(OwnStatistics)), "fails for 1 image"
    ),
}


def attends(_network: Any, features: Tensor, logits: Tensor) -> Tensor:
    """Add attention of the features to themselves, with dropout."""
    rows = features[:, None, None]
    mixed = F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.1)
    return logits + mixed.mean((1, 2, 3))[:, None]


DRAWS = "draws random numbers"
RANDOM: dict[str, Row] = {
    "a dropout of a value in a billion": Row(
        network(lambda n, f, y: F.dropout(y, 1e-9, training=True)), DRAWS
    ),
    "attention with dropout": Row(network(attends), DRAWS),
}


def fills_cache(built: Any, features: Tensor, _logits: Tensor) -> Tensor:
    if "scale" not in built.cache:
        built.cache["scale"] = built.fc.weight.sum(0)
    logits: Tensor = built.fc(features * built.cache["scale"])
    return logits


def ties(built: Any) -> None:
    built.other = nn.Linear(WIDTH, CLASSES)
    built.other.weight = built.fc.weight


def valid(kind: type[Planted]) -> Row:
    """Remove the branch of a *kind* of network."""
    return Row(kind, "", ("aux",))


VALID: dict[str, Row] = {
    "nothing planted": Row(Planted, "", ("aux",), plain=without_branch(Planted)),
    "a tied weight": valid(network(lambda n, f, y: y + n.other(f.sqrt()), ties)),
    "a cache of a weight": valid(network(fills_cache, puts(cache=dict))),
}


class Normed(Planted):
    """Normalizes its features with an epsilon and by a table that no state dict has."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("scale", torch.arange(float(WIDTH)), persistent=False)

    def answer(self, features: Tensor, _logits: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(features) * self.scale)
        return logits


def beside_plain(change: Change, refused: str) -> Row:
    """Compare a network that *change* changes with a plain one that is as it was."""

    def build() -> nn.Module:
        built = Normed()
        change(built)
        return built

    return Row(build, refused, ("aux",), plain=without_branch(Normed))


PLAIN = r"the plain one"
# The plain network is another one
OTHERS: dict[str, Row] = {
    "another eps": beside_plain(lambda n: setattr(n.norm, "eps", 1e-4), PLAIN),
    "a module nobody declared": beside_plain(
        lambda n: n.add_module("spy", nn.Linear(1, 1)), "has spy"
    ),
    "a table that no state dict has": beside_plain(lambda n: n.scale.add_(1), "scale differs"),
    "a layer that stays in train mode": beside_plain(
        lambda n: setattr(n.norm, "train", lambda mode=True: n.norm),
        "fails for 1 image",
    ),
}


def passed_on(
    _mode: Any, function: Any, _types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    return function(*args, **(kwargs or {}))


class Quiet(TorchFunctionMode):
    __torch_function__ = passed_on


class Silent(TorchDispatchMode):
    __torch_dispatch__ = passed_on


@contextmanager
def hook_on_all_modules() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda _m, _i, output: output)
    try:
        yield
    finally:
        handle.remove()


ACTIVE: dict[str, Row] = {
    "a hook on all modules": Row(Planted, "on all modules", during=hook_on_all_modules),
    "autocast": Row(
        Planted,
        "torch.autocast is active for cpu",
        during=lambda: torch.autocast("cpu", torch.bfloat16),
    ),
    "a function mode": Row(Planted, "the torch function mode Quiet is active", during=Quiet),
    "a dispatch mode": Row(Planted, "the torch dispatch mode Silent is active", during=Silent),
}
