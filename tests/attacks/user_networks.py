"""Short networks of users: some compute something else than their graph shows, the others only look like it.

`limit` is a bound that no logit of the exporter's generated images reaches, but logits of other
images do.
"""

import functools
import itertools
import logging
import random
import threading
import types
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CLASSES, WIDTH = 4, 8


class Small(nn.Module):
    """A convolution and a classifier over mean features, with a branch that only training uses."""

    limit = 2.5

    def __init__(self, branch: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.branches = nn.Linear(WIDTH, CLASSES) if branch else None
        self.prepare()

    def prepare(self) -> None:
        """Add what a subclass needs."""

    def features(self, images: Tensor) -> Tensor:
        return self.conv(images).relu().mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        if self.training and self.branches is not None:
            return self.answer(features), self.branches(features)
        return self.answer(features)

    def answer(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features)
        return logits

    def bounded(self, features: Tensor) -> Tensor:
        return Small.answer(self, features).clamp(max=self.limit)


def trained(network: nn.Module) -> nn.Module:
    """Give *network* weights such that saturated colors give larger logits than the generated images."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted(network.named_parameters()):
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator)
                * (0.4 if "weight" in name else 0.1)
            )
    return network.eval()


def small(
    answer: Callable[[Any, Tensor], Tensor], prepare: Callable[[Any], None] | None = None
) -> type[Small]:
    """Define a `Small` with another *answer* and *prepare*."""
    return type("Network", (Small,), {"answer": answer, "prepare": prepare or Small.prepare})


def with_forward(forward: Callable[[Any, Tensor], Any], prepare: Any = None) -> type[Small]:
    """Define a `Small` with another *forward*."""
    return type("Network", (Small,), {"forward": forward, "prepare": prepare or Small.prepare})


def buffer(name: str, value: Tensor, **options: Any) -> Callable[[Any], None]:
    return lambda network: network.register_buffer(name, value.clone(), **options)


PEAK = buffer("peak", torch.zeros(()))


def peaking(
    read: Callable[[Any], Tensor], write: Callable[[Any, Tensor], object], prepare: Any = None
) -> Any:
    """Define a network that halves its logits once the peak of all earlier images exceeds the limit."""

    def answer(self: Any, features: Tensor) -> Tensor:
        logits = self.fc(features)
        write(self, torch.maximum(read(self), (logits.amax() - self.limit).relu()))
        return torch.where(read(self) > 0, 0.5 * logits, logits)

    return small(answer, prepare)


def replaces_parameter(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.fc.bias = nn.Parameter(self.fc.bias - (logits.amax(0) - self.limit).relu())
    return logits


def first_run(self: Any, features: Tensor) -> Tensor:
    if not hasattr(self, "started"):
        self.started = True
        return self.fc(features)
    return self.bounded(features)


def counts_runs(self: Any, features: Tensor) -> Tensor:
    self.history.append(1)
    return self.fc(features) if len(self.history) < 200 else self.bounded(features)


SEEN = [torch.zeros(())]


class Stats:
    """An object that a network holds."""

    def __init__(self) -> None:
        self.peak = torch.zeros(())


def holds(name: str, make: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda network: setattr(network, name, make())


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def closure() -> Callable[[], int]:
    """Return a function that counts its calls in an enclosing variable."""
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def numbers() -> Iterator[int]:
    yield from range(10**9)


def position() -> Callable[[], int]:
    """Return a function that changes the position of a generator only, and none of its variables.

    It has three steps, because two runs lie between the reads of the state.
    """

    def steps() -> Iterator[int]:
        while True:
            yield 0
            yield 0
            yield 0

    generator = steps()
    return lambda: next(generator)


class Shared:
    """Counts in its class."""

    calls: ClassVar[deque[int]] = deque()

    def __call__(self) -> int:
        self.calls.append(0)
        return len(self.calls)


def later(count: Callable[[Any], int], make: Callable[[], Any]) -> type[Small]:
    """Define a network that negates its logits after 600 calls, which *count* counts in what *make* makes."""
    return small(
        lambda n, f: n.fc(f) if count(n.counter) < 600 else -n.fc(f), holds("counter", make)
    )


def in_place(
    change: Callable[[Any], Any], size: Callable[[Any], int] = len
) -> Callable[[Any], int]:
    return lambda counter: (change(counter), size(counter))[1]


COUNTERS: dict[str, type[Small]] = {
    "a deque grows": later(in_place(lambda c: c.append(0)), deque),
    "a deque rotates": later(
        in_place(lambda c: c.rotate(1), lambda c: c[0]), lambda: deque(range(700))
    ),
    "a bytearray grows": later(in_place(lambda c: c.append(0)), bytearray),
    "a byte changes": later(
        in_place(lambda c: c.__setitem__(0, c[0] + 1), lambda c: c[0]), lambda: bytearray(1)
    ),
    "an array grows": later(in_place(lambda c: c.append(0)), lambda: array("b")),
    "the type of an array changes": later(
        lambda c: (
            c.__setitem__(0, c[0].view({"i": "u4", "u": "f4", "f": "i4"}[c[0].dtype.kind])) or 0
        ),
        lambda: [np.zeros(1, "i4")],
    ),
    "a set grows": later(in_place(lambda c: c.add(len(c))), set),
    "itertools.count": later(next, itertools.count),
    "an iterator": later(next, lambda: iter(range(10**9))),
    "an enumeration of a list": later(lambda c: next(c)[0], lambda: enumerate([0] * 10**4)),
    "a generator": later(next, numbers),
    "the position of a generator": later(lambda c: c(), position),
    "random.Random": later(lambda c: c.randrange(599), lambda: random.Random(0)),
    "a generator of NumPy": later(lambda c: c.integers(599), np.random.default_rng),
    "the random numbers of Python": small(
        lambda n, f: n.fc(f) * (1 if random.random() < 2 else -1)
    ),
    "the random numbers of NumPy": small(
        lambda n, f: n.fc(f) * (1 if np.random.rand() < 2 else -1)  # noqa: NPY002
    ),
    "slots": later(lambda c: c(), Slotted),
    "a closure": later(lambda c: c(), closure),
    "a class attribute": later(lambda c: c(), Shared),
    "a namespace": later(
        in_place(lambda c: setattr(c, "n", c.n + 1), lambda c: c.n), lambda: Namespace(n=0)
    ),
    "an attribute of a number": later(
        in_place(lambda c: setattr(c, "calls", c.calls + 1), lambda c: c.calls),
        type("Number", (float,), {"calls": 0}),
    ),
    "a partial": later(lambda c: c(), lambda: functools.partial(closure())),
    "a method of random.Random": later(lambda c: c(), lambda: random.Random(0).random),
    "a property": later(
        lambda c: c.runs,
        type("Runs", (), {"runs": property(functools.partial(next, itertools.count()))}),
    ),
    "a bound method": later(lambda c: c(), lambda: Slotted().__call__),
    "six levels of lists": later(
        in_place(lambda c: c[0][0][0][0][0].append(0), lambda c: len(c[0][0][0][0][0])),
        lambda: [[[[[[]]]]]],
    ),
}


def keeping(use: Callable[[Any, Any, Tensor], Tensor], keep: Any = None) -> type[Small]:
    """Define a network that replaces what it keeps in every run, and returns `use(network, kept, logits)`.

    *kept* is what the last run has left, None in the first one. By default, it keeps how far
    the largest logit is above the limit.
    """

    def answer(self: Any, features: Tensor) -> Tensor:
        kept, logits = vars(self).get("kept"), self.fc(features)
        self.kept = (
            (logits.amax() - self.limit).relu()
            if keep is None
            else keep(kept, features, logits)
        )
        return use(self, kept, logits)

    return small(answer)


def halved(kept: Any, logits: Tensor) -> Tensor:
    return torch.where(kept > 0, 0.5 * logits, logits)


def swallows(_network: Any, kept: Any, logits: Tensor) -> Tensor:
    with suppress(Exception):
        return logits if len(kept) < 300 else 0.5 * logits
    return logits


def marked(kept: Any, _features: Tensor, logits: Tensor) -> Tensor:
    vars(logits)["runs"] = vars(kept)["runs"] + 1 if type(kept) is Tensor else 0
    return logits


# Each hides that it reads what the last run left: by its type, which nothing can record, or by
# `except`.
KEPT: dict[str, type[Small]] = {
    "the peak of the last image": keeping(
        lambda _, kept, y: y if kept is None else halved(kept, y)
    ),
    "the peak, if it is a tensor": keeping(
        lambda _, kept, y: halved(kept, y) if type(kept) is Tensor else y
    ),
    "the size of the last batch": keeping(
        lambda _, kept, y: 0.5 * y if type(kept) is Tensor and kept.shape[0] > 64 else y,
        lambda _kept, features, _logits: features,
    ),
    "a number of the last batch": keeping(
        lambda _, kept, y: 0.5 * y if type(kept) is int and kept > 64 else y,
        lambda _kept, features, _logits: features.shape[0],
    ),
    "that there was a run": keeping(
        lambda n, kept, y: y if kept is None else y.clamp(max=n.limit)
    ),
    "a count in a new tuple": keeping(
        lambda n, _, y: y if n.kept[0] < 200 else 0.5 * y,
        lambda kept, _features, _logits: (kept[0] + 1 if type(kept) is tuple else 0,),
    ),
    "a count on a new tensor": keeping(
        lambda n, _, y: y if vars(n.kept)["runs"] < 200 else 0.5 * y, marked
    ),
    "a count in another object": keeping(
        lambda n, _, y: y if n.kept.n < 200 else 0.5 * y,
        lambda kept, _features, _logits: Namespace(
            n=kept.n + 1 if type(kept) is Namespace else 0
        ),
    ),
    "a list that grows, if it can": keeping(
        swallows,
        lambda kept, _features, logits: [*kept, logits] if type(kept) is list else [logits],
    ),
    "its own memory, with another view": keeping(
        lambda _, kept, y: y + 0 * kept.data.view(-1)[:1] if type(kept) is Tensor else y,
        lambda _kept, features, _logits: features,
    ),
}


STATE: dict[str, type[Small]] = {
    **COUNTERS,
    **KEPT,
    "a buffer is assigned": peaking(
        lambda n: n.peak, lambda n, peak: setattr(n, "peak", peak), PEAK
    ),
    "a buffer is written through .data": peaking(
        lambda n: n.peak, lambda n, peak: n.peak.data.copy_(peak), PEAK
    ),
    "a list of buffers is written through .data": peaking(
        lambda n: n.peak, lambda n, peak: torch._foreach_copy_([n.peak.data], [peak]), PEAK
    ),
    "a tensor in nested lists is replaced": peaking(
        lambda n: n.memory[0][0],
        lambda n, peak: n.memory[0].__setitem__(0, peak),
        holds("memory", lambda: [[torch.zeros(())]]),
    ),
    "a tensor of an object is replaced": peaking(
        lambda n: n.memory.peak,
        lambda n, peak: setattr(n.memory, "peak", peak),
        holds("memory", Stats),
    ),
    "a tensor of the Python module is replaced": peaking(
        lambda _: SEEN[0], lambda _, peak: SEEN.__setitem__(0, peak)
    ),
    "a parameter is replaced": small(replaces_parameter),
    "the first run differs": small(first_run),
    "a list grows": small(counts_runs, holds("history", list)),
}


class GetState(Small):
    """A copy of it lacks its own limit."""

    limit = 1e9

    def prepare(self) -> None:
        self.limit = 2.5

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "limit"}

    answer = Small.bounded


class SetState(Small):
    """A copy of it has scaled weights."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.no_grad():
            self.fc.bias.add_(1e-3)


def compiled(network: nn.Module) -> nn.Module:
    network.compile(
        backend=lambda graph, _: lambda *inputs: tuple(x * 2 for x in graph(*inputs))
    )
    return network


COPIES: dict[str, Callable[[], nn.Module]] = {
    "__getstate__ drops an attribute": GetState,
    "__setstate__ changes a weight": SetState,
    "a backend of Module.compile": lambda: compiled(Small()),
    "a backend of torch.compile": lambda: torch.compile(
        Small(), backend=lambda graph, _: graph
    ),
}


def by_size(test: Callable[[Tensor], bool]) -> type[Small]:
    return small(lambda n, f: n.bounded(f) if test(f) else n.fc(f))


SIZES: dict[str, type[Small]] = {
    "the size is 1": by_size(lambda f: f.shape[0] == 1),
    "the size is above 40": by_size(lambda f: f.shape[0] > 40),
    "the layout of one image": by_size(lambda f: f.t().is_contiguous()),
}


def transposed() -> Tensor:
    return torch.arange(float(WIDTH * CLASSES)).reshape(WIDTH, CLASSES).t() / 30


def reads_value(network: Any, features: Tensor) -> Tensor:
    large = False
    with suppress(Exception):  # of torch.export
        large = bool(network.fc(features).amax() > network.limit)
    return network.bounded(features) if large else network.fc(features)


def by_layout(test: Callable[[Any, Tensor], bool]) -> type[Small]:
    return with_forward(
        lambda n, x: n.bounded(n.features(x)) if test(n, x) else n.fc(n.features(x))
    )


def transpose_weight(network: nn.Module) -> nn.Module:
    network.fc.weight = nn.Parameter(network.fc.weight.detach().t().contiguous().t())
    return network


MEMORY: dict[str, Callable[[], nn.Module]] = {
    "as_strided on a transposed attribute": small(
        lambda n, f: n.fc(f) + f @ torch.as_strided(n.table, (WIDTH, CLASSES), (CLASSES, 1)),
        holds("table", transposed),
    ),
    "the layout of the images": by_layout(lambda n, x: x.is_contiguous()),
    "the text of a tensor": small(
        lambda n, f: -n.fc(f) if "9.25" in str(n.fc(f).data) else n.fc(f)
    ),
    "a value behind try": small(lambda n, f: reads_value(n, f)),
    "bfloat16 in forward": small(
        lambda n, f: nn.functional.linear(
            f.bfloat16(), n.fc.weight.bfloat16(), n.fc.bias.bfloat16()
        ).float()
    ),
    "a default type": lambda: with_default_type(),
}


def with_default_type() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return Small()


class Nested(Small):
    def prepare(self) -> None:
        self.hidden = [[nn.Linear(WIDTH, WIDTH)]]

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(self.hidden[0][0](features))


LAYER = nn.Linear(WIDTH, WIDTH)


class GetAttribute(Small):
    def __getattr__(self, name: str) -> Any:
        return LAYER if name == "hidden" else super().__getattr__(name)

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(self.hidden(features))


CONSTANTS: dict[str, type[Small]] = {
    "layers in nested lists": Nested,
    "a layer behind __getattr__": GetAttribute,
}


def hooked(make_hook: Callable[[Any], Any], prepare: Any = None) -> type[Small]:
    """Define a network whose convolution has the hook that *make_hook* makes for it."""

    def with_hook(network: Any) -> None:
        (prepare or Small.prepare)(network)
        network.conv.register_forward_hook(make_hook(network))

    return type("Hooked", (Small,), {"prepare": with_hook})


def counting_hook(_network: Any) -> Any:
    count = closure()
    return lambda _module, _inputs, output: output if count() < 600 else -output


def hook_that_ends(network: Any) -> Any:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        network.conv._forward_hooks.clear()
        return 2 * output

    return hook


class Hears(Small):
    """Adds what a hook of its branch has left, and sets it back."""

    heard: ClassVar[list[Tensor]] = []

    def prepare(self) -> None:
        if self.branches is not None:
            self.branches.register_forward_hook(
                lambda _module, _inputs, output: self.heard.append(output)
            )

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.branches is not None:
            self.branches(features)
        logits = self.fc(features)
        return logits + 0 * self.heard.pop() if self.heard else logits


def bound(
    forward: Callable[[Any, Tensor], Tensor], change: Callable[[Any], Any] = lambda _: None
) -> Any:
    """Return a builder of a network with another forward on the instance, which calls the original one."""

    def build() -> nn.Module:
        network = Small()
        original = network.forward
        vars(network)["forward"] = lambda images: forward(original, images)
        change(network)
        return network

    return build


def counts_calls() -> nn.Module:
    network, count = Small(), closure()

    def forward(self: Any, images: Tensor) -> Tensor:
        logits = self.fc(self.features(images))
        return logits if count() < 600 else -logits

    network.forward = types.MethodType(forward, network)  # type: ignore[method-assign]
    return network


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


def masks_nan(network: Any, features: Tensor) -> Tensor:
    logits = network.fc(features)
    return torch.where(logits < 1e9, logits, features @ network.spare)


# Hooks, replaced methods, layers in train mode and NaN are no reason to refuse; what they do
# here is.
ODD: dict[str, Callable[[], nn.Module]] = {
    "a hook that counts its calls": hooked(counting_hook),
    "a hook that ends after its first call": hooked(hook_that_ends),
    "a hook that reads the branch": hooked(
        lambda n: lambda _m, _i, x: x + 0 * n.branches.weight.sum()
    ),
    "a hook that asks what the branch is": hooked(
        lambda n: lambda _m, _i, output: output if type(n.branches) is nn.Linear else -output
    ),
    "a hook that keeps every result": hooked(
        lambda n: lambda _m, _i, output: n.kept.append(output), holds("kept", list)
    ),
    "a hook of a branch": Hears,
    "a forward of the original": bound(lambda original, x: original(x)),
    "a forward of the original, in another layout": bound(
        lambda original, x: original(x), lambda n: n.to(memory_format=torch.channels_last)
    ),
    "a bound forward that counts": counts_calls,
    "a dropout of a value in ten million": small(
        lambda n, f: n.fc(n.drop(f)), lambda n: n.add_module("drop", RarelyDrops())
    ),
    "statistics of the batch in eval mode": small(
        lambda n, f: n.norm(n.fc(f)), lambda n: n.add_module("norm", OwnStatistics())
    ),
    "NaN that no probe image selects": small(
        masks_nan, buffer("spare", torch.full((WIDTH, CLASSES), torch.nan))
    ),
}


def prepared(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def build(branch: bool = True) -> nn.Module:
        network = Small(branch)
        change(network)
        return network

    return build


def multi_head(network: Any, images: Tensor) -> Tensor:
    tokens = network.conv(images).flatten(2).transpose(1, 2)
    return network.fc(network.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def fills_cache(network: Any, features: Tensor) -> Tensor:
    if "scale" not in network.cache:
        network.cache["scale"] = network.fc.weight.sum(0)
    return network.fc(features * network.cache["scale"])


def fills_grid(network: Any, images: Tensor) -> Tensor:
    size = tuple(images.shape[2:])
    if network.grids.get(size) is None:
        network.grids[size] = torch.linspace(-1, 1, size[1])
    return network.fc(network.features(images * network.grids[size]))


@functools.lru_cache
def cells(side: int) -> float:
    return 1 / side


def ties(network: Any) -> None:
    network.other = nn.Linear(WIDTH, CLASSES)
    network.other.weight = network.fc.weight


VALID: dict[str, Callable[..., nn.Module]] = {
    "a choice by value": small(
        lambda n, f: torch.where(n.fc(f) > n.limit, n.fc(f) * 0.5, n.fc(f))
    ),
    "channels last": prepared(lambda n: n.to(memory_format=torch.channels_last)),
    "a transposed weight": prepared(transpose_weight),
    "a tied weight": small(lambda n, f: n.fc(f) + n.other(f.sqrt()), ties),
    "a buffer outside of the state dict": small(
        lambda n, f: n.fc(f * n.scale),
        buffer("scale", torch.arange(float(WIDTH)), persistent=False),
    ),
    "weight norm": prepared(lambda n: parametrizations.weight_norm(n.fc)),
    "a cache of a weight": small(fills_cache, holds("cache", dict)),
    "a cache of positions by size": with_forward(fills_grid, holds("grids", dict)),
    "a function with a cache": with_forward(
        lambda n, x: n.fc(n.features(x)) * cells(x.shape[2])
    ),
    "a lock and a logger": small(
        lambda n, f: n.fc(f),
        lambda n: vars(n).update(lock=threading.Lock(), log=logging.getLogger("n")),
    ),
    "multi-head attention": with_forward(
        multi_head,
        lambda n: n.add_module("mix", nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    ),
    "a recurrent layer": with_forward(
        lambda n, x: n.fc(n.rows(n.conv(x).mean(2).transpose(1, 2))[0][:, -1]),
        lambda n: n.add_module("rows", nn.GRU(WIDTH, WIDTH, batch_first=True)),
    ),
}
