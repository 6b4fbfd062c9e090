"""Networks whose graph hides what they compute, or is not that of the plain network; others only look so."""

import functools
import logging
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attacks.planted.network import (
    CLASSES,
    LIMIT,
    WIDTH,
    Change,
    Planted,
    Row,
    buffer,
    changed,
    limited,
    logits_of,
    network,
    of_images,
    puts,
)
from tests.attacks.planted.state import closure


def without_branch(kind: type[Planted]) -> Callable[[], nn.Module]:
    return lambda: kind(branch=False)


COPIED = r"compiled with a custom backend"


class GetState(Planted):
    """A copy of it lacks its own limit."""

    limit = 1e9

    def prepare(self) -> None:
        self.limit = LIMIT

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "limit"}

    def answer(self, _features: Tensor, logits: Tensor) -> Tensor:
        return logits.clamp(max=self.limit)


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
    "__getstate__ drops an attribute": Row(GetState),
    "__setstate__ changes a weight": Row(SetState),
    "a backend of Module.compile": Row(changed(lambda n: n.compile(backend=doubled)), COPIED),
    "a backend of torch.compile": Row(
        lambda: torch.compile(Planted(), backend=doubled),
        COPIED,  # type: ignore[return-value]
    ),
}

SIZE = (
    r"a plain run of the network gives other|two runs of the network differ|treats some batch sizes differently|"
    r"Python code .* reads tensors \(is_contiguous in|with a batch|fixes the size"
)


def by_size(test: Callable[[Tensor], bool], batch: int = 5) -> Row:
    """Plant a network that limits its logits if *test* holds for the features (B, 8)."""
    kind = network(lambda n, f, y: limited(y) if test(f) else y)
    return Row(kind, SIZE, batch=batch)


def other_operations(_network: Any, features: Tensor, logits: Tensor) -> Tensor:
    return logits * 1.0 if features.shape[0] == 1 else logits


SIZES: dict[str, Row] = {
    "the size is 1": by_size(lambda f: f.shape[0] == 1),
    "the size is 3": by_size(lambda f: f.shape[0] == 3),
    "the size is above 40": by_size(lambda f: f.shape[0] > 40, batch=64),
    "the layout of one image": by_size(lambda f: f.t().is_contiguous()),
    "other operations for one image": Row(network(other_operations), batch=5),
}

MEMORY_READ = (
    r"reads memory with as_strided|out of bounds for storage|gives other outputs than its graph|"
    r"bfloat16|torch\.set_default_dtype\(torch\.float64\) is active"
)


def transposed() -> Tensor:
    return torch.arange(float(WIDTH * CLASSES)).reshape(WIDTH, CLASSES).t() / 30


def reads_value(_network: Any, _features: Tensor, logits: Tensor) -> Tensor:
    large = False
    with suppress(Exception):  # of torch.export
        large = bool(logits.amax() > LIMIT)
    return limited(logits) if large else logits


def in_bfloat16(built: Any, features: Tensor, _logits: Tensor) -> Tensor:
    weight = built.fc.weight.bfloat16()
    return F.linear(features.bfloat16(), weight, built.fc.bias.bfloat16()).float()


def by_layout(built: Any, images: Tensor) -> Tensor:
    logits = logits_of(built, images)
    return limited(logits) if images.is_contiguous() else logits


def with_default_type() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return Planted()


MEMORY: dict[str, Row] = {
    "as_strided on a transposed attribute": Row(
        network(
            lambda n, f, y: y + f @ torch.as_strided(n.table, (WIDTH, CLASSES), (CLASSES, 1)),
            puts(table=transposed),
        ),
        MEMORY_READ,
    ),
    "the layout of the images": Row(of_images(by_layout)),
    "the text of a tensor": Row(network(lambda n, f, y: -y if "9.25" in str(y.data) else y)),
    "a value behind try": Row(network(reads_value), MEMORY_READ),
    "cond": Row(
        network(
            lambda n, f, y: torch.cond(y.sum() > 0, lambda x: x * 1, lambda x: x * 2, (y,))
        ),
        r"a graph has no control flow, .* torch\.where",
    ),
    "bfloat16 in forward": Row(network(in_bfloat16), MEMORY_READ),
    "a default type": Row(with_default_type, MEMORY_READ),
    "a negated view": Row(
        changed(lambda n: setattr(n.fc, "weight", negated(n.fc.weight))),
        r"^fc\.weight is a negated view, .*resolve_neg",
    ),
    "a weight without values": Row(
        changed(lambda n: n.fc.to("meta")), r"fc\.weight is a .* on meta; .*load its values"
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


class GetAttribute(Planted):
    """Finds a layer of its Python module as an attribute."""

    def __getattr__(self, name: str) -> Any:
        return LAYER if name == "hidden" else super().__getattr__(name)

    def answer(self, features: Tensor, _logits: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.hidden(features))
        return logits


LAYER = nn.Linear(WIDTH, WIDTH)
TABLE = torch.linspace(0, 1, 2 * WIDTH * CLASSES).reshape(2, WIDTH, CLASSES)
ROWS = TABLE[0].tolist()
UNSTORED = r"is no parameter or buffer, .*; try allow_constants=True$"
IN_LIST = r"trainable tensor .* that is no registered parameter, .* use ModuleList"


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


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept = functools.lru_cache(function)

    @functools.wraps(function)
    def call(*sizes: int) -> Tensor:
        return kept(*sizes)

    return call


class Tables:
    """Has functions that keep what they return."""

    @staticmethod
    @decorated
    def table_of(side: int) -> Tensor:
        return torch.linspace(0, side, WIDTH * CLASSES).reshape(WIDTH, CLASSES)


@functools.cache
def global_table() -> Tensor:
    return TABLE[0]


@functools.cache
def drawn_table() -> Tensor:
    return torch.rand(WIDTH, CLASSES)


CONSTANTS: dict[str, Row] = {
    "layers in nested lists": Row(Nested, IN_LIST),
    "layers in nested lists, allowed": Row(Nested, allow_constants=True),
    "a layer behind __getattr__": Row(GetAttribute, IN_LIST),
    "a global table, in the plain network, too": Row(
        adds(lambda _: TABLE[0]),
        UNSTORED,
        ("aux",),
        plain=without_branch(adds(lambda _: TABLE[0])),
    ),
    "its own tensor": rebuilt(adds(lambda n: n.table, lambda: TABLE[0].clone())),
    "a tensor that forward makes": rebuilt(adds(lambda _: torch.tensor(ROWS))),
    "random numbers": rebuilt(
        adds(lambda n: n.table, lambda: torch.rand(TABLE[0].shape)), UNSTORED
    ),
    "a global tensor": rebuilt(adds(lambda _: TABLE[0]), UNSTORED),
    "a global tensor that it finds by its name": rebuilt(
        adds(lambda _: globals()["TABLE"][0]), UNSTORED
    ),
    "a table that a function keeps": rebuilt(adds(lambda _: table_of(WIDTH))),
    "a table that a decorated method keeps": rebuilt(adds(lambda _: Tables.table_of(WIDTH))),
    "a global tensor that a function keeps": rebuilt(adds(lambda _: global_table()), UNSTORED),
    "random numbers that a function keeps": rebuilt(adds(lambda _: drawn_table()), UNSTORED),
    "a tensor that both networks hold": rebuilt(
        adds(lambda n: n.table[0], lambda: TABLE), UNSTORED
    ),
    "a parameter in a list": rebuilt(
        adds(lambda n: n.table[0], lambda: [nn.Parameter(TABLE[0].clone())]), IN_LIST
    ),
    "a layer in a list": rebuilt(
        network(
            lambda n, f, y: y + n.table[0](f),
            lambda n: torch.manual_seed(0),
            puts(table=lambda: [nn.Linear(WIDTH, CLASSES)]),
        ),
        IN_LIST,
    ),
}


def hooked(make_hook: Callable[[Any], Any], *before: Change) -> type[Planted]:
    """Define a network whose convolution has the hook that *make_hook* makes for it."""
    register: Change = lambda built: built.conv.register_forward_hook(make_hook(built))  # noqa: E731
    return network(lambda n, f, y: y, *before, register)


def counting_hook(_network: Any) -> Any:
    count = closure()
    return lambda _module, _inputs, output: output if count() < 200 else -output


def hook_that_ends(built: Any) -> Any:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        built.conv._forward_hooks.clear()
        return 2 * output

    return hook


class Hears(Planted):
    """Adds what a hook of its branch has left, and sets it back."""

    def prepare(self) -> None:
        self.heard: list[Tensor] = []
        if self.aux is not None:
            self.aux.register_forward_hook(
                lambda _module, _inputs, output: self.heard.append(output)
            )

    def answer(self, features: Tensor, logits: Tensor) -> Tensor:
        if self.aux is not None:
            self.aux(features)
        return logits + 0 * self.heard.pop() if self.heard else logits


def bound(*changes: Change) -> Callable[[], nn.Module]:
    """Return a builder of a network with a forward of the instance, which calls the original one."""

    def build() -> nn.Module:
        built = Planted()
        original = built.forward
        vars(built)["forward"] = lambda images: original(images)
        for change in changes:
            change(built)
        return built

    return build


def counts_calls() -> nn.Module:
    built = Planted()
    count = closure()

    def forward(self: Any, images: Tensor) -> Tensor:
        logits = logits_of(self, images)
        return logits if count() < 200 else -logits

    built.forward = types.MethodType(forward, built)  # type: ignore[method-assign]
    return built


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


ODDITY = (
    r"in train mode|depends? on .*aux|holds NaN|fails for [14] images?|random numbers|"
    r"a second run|plain run|earlier run computed"
)

# Hooks, replaced methods, layers in train mode and NaN are no reason to refuse; what they do
# here is.
ODD: dict[str, Row] = {
    "a hook that counts its calls": Row(hooked(counting_hook)),
    "a hook that ends after its first call": Row(hooked(hook_that_ends), ODDITY),
    "a hook that reads the branch": Row(
        hooked(lambda n: lambda _m, _i, x: x + 0 * n.aux.weight.sum()), ODDITY, ("aux",)
    ),
    "a hook that asks what the branch is": Row(
        hooked(lambda n: lambda _m, _i, x: x if type(n.aux) is nn.Linear else -x),
        parts=("aux",),
    ),
    "a hook that keeps every result": Row(
        hooked(lambda n: lambda _m, _i, x: n.kept.append(x), puts(kept=list))
    ),
    "a hook of a branch": Row(Hears, ODDITY, ("aux",)),
    "a forward of the original": Row(bound()),
    "a forward of the original, in another layout": Row(
        bound(lambda n: n.to(memory_format=torch.channels_last))
    ),
    "a bound forward that counts": Row(counts_calls),
    "a dropout of a value in ten million": Row(
        network(lambda n, f, y: n.fc(n.part(f)), part(RarelyDrops)), ODDITY
    ),
    "statistics of the batch in eval mode": Row(
        network(lambda n, f, y: n.part(y), part(OwnStatistics)), ODDITY
    ),
    "NaN that no ordinary image selects": Row(
        network(
            lambda n, f, y: torch.where(y < 1e9, y, f @ n.spare),
            buffer("spare", torch.full((WIDTH, CLASSES), torch.nan)),
        ),
        ODDITY,
    ),
}


def attends(p: float) -> type[Planted]:
    """Define a network that adds attention of its features to themselves, which drops a part *p*."""

    def answer(_network: Any, features: Tensor, logits: Tensor) -> Tensor:
        rows = features[:, None, None]
        mixed = F.scaled_dot_product_attention(rows, rows, rows, dropout_p=p)
        return logits + mixed.mean((1, 2, 3))[:, None]

    return network(answer)


RANDOM: dict[str, Row] = {
    "Monte Carlo dropout": Row(
        network(lambda n, f, y: n.fc(F.dropout(f, 0.5, training=True))),
        r"draws random numbers|other logits in a second run",
    ),
    "a dropout of a value in a billion": Row(
        network(lambda n, f, y: F.dropout(y, 1e-9, training=True)), r"draws random numbers"
    ),
    "attention with dropout": Row(
        attends(0.1),
        r"draws random numbers|other logits in a second run",
    ),
    "attention without dropout": Row(attends(0.0)),
    "dropout in eval mode": Row(
        network(lambda n, f, y: n.fc(F.dropout(f, 0.5, training=n.training)))
    ),
}


def multi_head(built: Any, images: Tensor) -> Tensor:
    tokens = built.conv(images).flatten(2).transpose(1, 2)
    mixed = built.part(tokens, tokens, tokens, need_weights=False)[0]
    logits: Tensor = built.fc(mixed.mean(1))
    return logits


def by_rows(built: Any, images: Tensor) -> Tensor:
    rows = built.conv(images).mean(2).transpose(1, 2)
    logits: Tensor = built.fc(built.part(rows)[0][:, -1])
    return logits


def fills_cache(built: Any, features: Tensor, _logits: Tensor) -> Tensor:
    if "scale" not in built.cache:
        built.cache["scale"] = built.fc.weight.sum(0)
    logits: Tensor = built.fc(features * built.cache["scale"])
    return logits


def fills_grid(built: Any, images: Tensor) -> Tensor:
    size = tuple(images.shape[2:])
    if built.grids.get(size) is None:
        built.grids[size] = torch.linspace(-1, 1, size[1])
    return logits_of(built, images * built.grids[size])


@functools.lru_cache
def cells(side: int) -> float:
    return 1 / side


def transpose_weight(built: Any) -> None:
    built.fc.weight = nn.Parameter(built.fc.weight.detach().t().contiguous().t())


def ties(built: Any) -> None:
    built.other = nn.Linear(WIDTH, CLASSES)
    built.other.weight = built.fc.weight


def valid(kind: type[Planted]) -> Row:
    """Remove the branch of a *kind* of network."""
    return Row(kind, "", ("aux",))


VALID: dict[str, Row] = {
    "nothing planted": Row(Planted, "", ("aux",), plain=without_branch(Planted)),
    "a choice by value": valid(network(lambda n, f, y: torch.where(y > LIMIT, y * 0.5, y))),
    "channels last": valid(
        network(lambda n, f, y: y, lambda n: n.conv.to(memory_format=torch.channels_last))
    ),
    "a transposed weight": valid(network(lambda n, f, y: y, transpose_weight)),
    "a tied weight": valid(network(lambda n, f, y: y + n.other(f.sqrt()), ties)),
    "a buffer outside of the state dict": valid(
        network(
            lambda n, f, y: n.fc(f * n.scale),
            buffer("scale", torch.arange(float(WIDTH)), persistent=False),
        )
    ),
    "weight norm": valid(
        network(lambda n, f, y: y, lambda n: parametrizations.weight_norm(n.fc))
    ),
    "a cache of a weight": valid(network(fills_cache, puts(cache=dict))),
    "a cache of positions by size": valid(of_images(fills_grid, puts(grids=dict))),
    "a function with a cache": valid(
        of_images(lambda n, x: logits_of(n, x) * cells(x.shape[2]))
    ),
    "a lock and a logger": valid(
        network(
            lambda n, f, y: y,
            lambda n: vars(n).update(lock=threading.Lock(), log=logging.getLogger("n")),
        )
    ),
    "multi-head attention": valid(
        of_images(multi_head, part(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)))
    ),
    "a recurrent layer": valid(
        of_images(by_rows, part(lambda: nn.GRU(WIDTH, WIDTH, batch_first=True)))
    ),
}


class SubtleLinear(nn.Linear):
    """Adds nothing."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) + 0.0


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


def subtle(built: Any) -> None:
    built.fc = SubtleLinear(WIDTH, CLASSES)


PLAIN = r"network is not the plain"
OTHERS: dict[str, Row] = {  # the plain network is another one
    "the same network": beside_plain(lambda n: None, ""),
    "another eps": beside_plain(lambda n: setattr(n.norm, "eps", 1e-4), PLAIN),
    "a layer that adds nothing": beside_plain(subtle, PLAIN),
    "a module nobody declared": beside_plain(
        lambda n: n.add_module("spy", nn.Linear(1, 1)), "has spy"
    ),
    "a hook that returns what it gets": beside_plain(
        lambda n: n.conv.register_forward_hook(lambda _m, _i, output: output * 1.0),
        PLAIN + "|forward hook on",
    ),
    "a table that no state dict has": beside_plain(
        lambda n: n.scale.add_(1), r"scale differs from the plain network's"
    ),
    "a layer that stays in train mode": beside_plain(
        lambda n: setattr(n.norm, "train", lambda mode=True: n.norm),
        "train mode|writes to norm|per channel when training",
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
