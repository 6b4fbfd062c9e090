"""Short networks of users: some compute something else than their graph shows, the others only look like it.

`limit` is a bound that no logit of the exporter's generated images reaches, but logits of other images do.
"""

import copy
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

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
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.4 if "weight" in name else 0.1))
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


def capped(self: Any, logits: Tensor, peak: Tensor) -> Tensor:
    """Return *logits*, scaled down once the peak of all earlier images exceeds the limit."""
    return torch.where(peak > self.limit, 0.5 * logits, logits)


def assigns_buffer(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.peak = torch.maximum(self.peak, (logits.amax() - self.limit).relu())
    return capped(self, logits, self.peak + self.limit)


def writes_data(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.peak.data.copy_(torch.maximum(self.peak, (logits.amax() - self.limit).relu()))
    return capped(self, logits, self.peak + self.limit)


def replaces_data(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.peak.data = torch.maximum(self.peak, (logits.amax() - self.limit).relu())
    return capped(self, logits, self.peak + self.limit)


def writes_out(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    torch.maximum(self.peak, (logits.amax() - self.limit).relu(), out=self.peak)
    return capped(self, logits, self.peak + self.limit)


def moves_running_mean(self: Any, features: Tensor) -> Tensor:
    logits = self.norm(self.fc(features))
    self.norm.running_mean = self.norm.running_mean + (logits.amax(0) - self.limit).relu()
    return logits


def writes_list(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.memory[0][0] = torch.maximum(self.memory[0][0], (logits.amax() - self.limit).relu())
    return capped(self, logits, self.memory[0][0] + self.limit)


def writes_class(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    type(self).seen = torch.maximum(type(self).seen, (logits.amax() - self.limit).relu())
    return capped(self, logits, type(self).seen + self.limit)


def writes_object(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.memory.peak = torch.maximum(self.memory.peak, (logits.amax() - self.limit).relu())
    return capped(self, logits, self.memory.peak + self.limit)


def replaces_parameter(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.fc.bias = nn.Parameter(self.fc.bias - (logits.amax(0) - self.limit).relu())
    return logits


def swaps_modules(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    self.fc, self.other = self.other, self.fc
    return logits


def first_run(self: Any, features: Tensor) -> Tensor:
    if not hasattr(self, "started"):
        self.started = True
        return self.fc(features)
    return self.bounded(features)


def remembers_first_peak(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    if self.first is None:
        self.first = (logits.amax() - self.limit).relu()
    return capped(self, logits, self.first + self.limit)


def counts_runs(self: Any, features: Tensor) -> Tensor:
    self.history.append(1)
    return self.fc(features) if len(self.history) < 200 else self.bounded(features)


SEEN = [torch.zeros(())]


def writes_default(self: Any, features: Tensor, memory: list[Tensor] = [torch.zeros(())]) -> Tensor:  # noqa: B006, B008
    logits = self.fc(features)
    memory[0] = torch.maximum(memory[0], (logits.amax() - self.limit).relu())
    return capped(self, logits, memory[0] + self.limit)


def writes_global(self: Any, features: Tensor) -> Tensor:
    logits = self.fc(features)
    SEEN[0] = torch.maximum(SEEN[0], (logits.amax() - self.limit).relu())
    return capped(self, logits, SEEN[0] + self.limit)


class Stats:
    """An object that a network holds."""

    def __init__(self) -> None:
        self.peak = torch.zeros(())


def holds(name: str, make: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda network: setattr(network, name, make())


STATE: dict[str, type[Small]] = {
    "a buffer is assigned": small(assigns_buffer, PEAK),
    "a buffer is written through .data": small(writes_data, PEAK),
    "the .data of a buffer is replaced": small(replaces_data, PEAK),
    "a buffer is an out argument": small(writes_out, PEAK),
    "a buffer outside of the state dict is assigned": small(
        assigns_buffer, buffer("peak", torch.zeros(()), persistent=False)
    ),
    "running statistics are assigned": small(
        moves_running_mean, lambda n: n.add_module("norm", nn.BatchNorm1d(CLASSES))
    ),
    "a tensor in nested lists is replaced": small(writes_list, holds("memory", lambda: [[torch.zeros(())]])),
    "a tensor of the class is replaced": small(
        writes_class, lambda n: setattr(type(n), "seen", torch.zeros(()))
    ),
    "a tensor of an object is replaced": small(writes_object, holds("memory", Stats)),
    "a tensor of the Python module is replaced": small(writes_global),
    "a tensor of a default argument is replaced": small(writes_default),
    "a parameter is replaced": small(replaces_parameter),
    "two layers change places": small(
        swaps_modules, lambda n: n.add_module("other", nn.Linear(WIDTH, CLASSES))
    ),
    "the first run differs": small(first_run),
    "the first peak is remembered": small(remembers_first_peak, holds("first", lambda: None)),
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


class DeepCopied(Small):
    """A copy of it is of another class."""

    answer = Small.bounded

    def __deepcopy__(self, memo: dict[int, Any]) -> Small:
        found = Unbounded(branch=self.branches is not None)
        found.load_state_dict(self.state_dict())
        return found.train(self.training)


class Unbounded(DeepCopied):
    answer = Small.answer


class Option:
    """A number that is another one in a copy."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Option":
        return Option(1e9)


class SetState(Small):
    """A copy of it has scaled weights."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.no_grad():
            self.fc.bias.add_(1e-3)


def compiled(network: nn.Module) -> nn.Module:
    network.compile(backend=lambda graph, _: lambda *inputs: tuple(x * 2 for x in graph(*inputs)))
    return network


class FailsTwice(Small):
    """Its copies cannot be copied."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.copies:
            raise RuntimeError("a copy of a copy")
        found = object.__new__(type(self))
        found.__dict__ = copy.deepcopy(self.__dict__, memo)
        found.copies = self.copies + 1
        return found


COPIES: dict[str, Callable[[], nn.Module]] = {
    "__getstate__ drops an attribute": GetState,
    "__deepcopy__ returns another class": DeepCopied,
    "__setstate__ changes a weight": SetState,
    "an option changes when it is copied": small(
        lambda n, f: n.fc(f).clamp(max=n.option.value), holds("option", lambda: Option(2.5))
    ),
    "a backend of Module.compile": lambda: compiled(Small()),
    "a backend of torch.compile": lambda: torch.compile(Small(), backend=lambda graph, _: graph),
    "the second copy fails": FailsTwice,
}


def by_size(test: Callable[[Tensor], bool]) -> type[Small]:
    return small(lambda n, f: n.bounded(f) if test(f) else n.fc(f))


SIZES: dict[str, type[Small]] = {
    "the size is 1": by_size(lambda f: f.shape[0] == 1),
    "the size is not 1": by_size(lambda f: f.size(0) != 1),
    "the length is 3": by_size(lambda f: len(f) == 3),
    "the size is above 40": by_size(lambda f: f.shape[0] > 40),
    "the size is odd": by_size(lambda f: f.shape[0] % 2 == 1),
    "the layout of one image": by_size(lambda f: f.t().is_contiguous()),
    "the stride of one image": by_size(lambda f: f[:1].expand_as(f).is_contiguous()),
    "the number of elements": by_size(lambda f: f.numel() == WIDTH),
    "squeezing the batch": small(
        lambda n, f: (
            n.fc(f).squeeze(0).unsqueeze(0).clamp(max=n.limit).reshape(-1, CLASSES)
            if f.squeeze(0).dim() == 1
            else n.fc(f)
        )
    ),
    "the size in a formula": small(
        lambda n, f: n.fc(f).clamp(max=n.limit * (1 + 100 * min(f.shape[0] - 1, 1)))
    ),
}


def transposed() -> Tensor:
    return torch.arange(float(WIDTH * CLASSES)).reshape(WIDTH, CLASSES).t() / 30


def reads_value(network: Any, features: Tensor) -> Tensor:
    large = False
    with suppress(Exception):  # of torch.export
        large = bool(network.fc(features).amax() > network.limit)
    return network.bounded(features) if large else network.fc(features)


def by_layout(test: Callable[[Any, Tensor], bool]) -> type[Small]:
    return with_forward(lambda n, x: n.bounded(n.features(x)) if test(n, x) else n.fc(n.features(x)))


class WithTransposedWeight(Small):
    """Computes something else if the weights are contiguous, as they are in a copy."""

    def answer(self, features: Tensor) -> Tensor:
        return self.bounded(features) if self.fc.weight.is_contiguous() else self.fc(features)


def transpose_weight(network: nn.Module) -> nn.Module:
    network.fc.weight = nn.Parameter(network.fc.weight.detach().t().contiguous().t())
    return network


MEMORY: dict[str, Callable[[], nn.Module]] = {
    "as_strided on a transposed attribute": small(
        lambda n, f: n.fc(f) + f @ torch.as_strided(n.table, (WIDTH, CLASSES), (CLASSES, 1)),
        holds("table", transposed),
    ),
    "as_strided on a weight": small(
        lambda n, f: n.fc(f) + f @ torch.as_strided(n.fc.weight, (WIDTH, CLASSES), (CLASSES, 1))
    ),
    "as_strided behind a buffer": small(
        lambda n, f: n.fc(f) + torch.as_strided(n.scale, (CLASSES,), (1,), CLASSES),
        lambda n: n.register_buffer("scale", torch.arange(2.0 * CLASSES)[:CLASSES]),
    ),
    "the layout of a weight": lambda: transpose_weight(WithTransposedWeight()),
    "the layout of the images": by_layout(lambda n, x: x.is_contiguous()),
    "the stride of the images": by_layout(lambda n, x: x.stride(1) == 1),
    "a value behind try": small(lambda n, f: reads_value(n, f)),
    "bfloat16 in forward": small(
        lambda n, f: nn.functional.linear(f.bfloat16(), n.fc.weight.bfloat16(), n.fc.bias.bfloat16()).float()
    ),
    "autocast in forward": with_forward(lambda n, x: autocast(n, x)),
    "a default type": lambda: with_default_type(),
}


def autocast(network: Any, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.fc(network.features(images))
    return logits.float()


def with_default_type() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return Small()


class Namespace(Small):
    """Its layers are in an object, in nested lists, or behind `__getattr__`."""

    def prepare(self) -> None:
        self.hidden = types.SimpleNamespace(layer=nn.Linear(WIDTH, WIDTH))

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(self.hidden.layer(features))


class Nested(Small):
    def prepare(self) -> None:
        self.hidden = [[nn.Linear(WIDTH, WIDTH)]]

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(self.hidden[0][0](features))


class Closure(Small):
    def prepare(self) -> None:
        layer = nn.Linear(WIDTH, WIDTH)
        object.__setattr__(self, "hidden", lambda features: layer(features))

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(self.hidden(features))


LAYER = nn.Linear(WIDTH, WIDTH)


class GetAttribute(Small):
    def __getattr__(self, name: str) -> Any:
        return LAYER if name == "hidden" else super().__getattr__(name)

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(self.hidden(features))


class InNumpy(Small):
    def prepare(self) -> None:
        self.matrix = np.random.default_rng().normal(size=(WIDTH, WIDTH)).astype(np.float32)

    def answer(self, features: Tensor) -> Tensor:
        return self.fc(features @ torch.from_numpy(self.matrix))


CONSTANTS: dict[str, type[Small]] = {
    "layers in an object": Namespace,
    "layers in nested lists": Nested,
    "a layer in a closure": Closure,
    "a layer behind __getattr__": GetAttribute,
    "a matrix of NumPy": InNumpy,
}


class Normalized(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm(dim=1, keepdim=True).clamp(min=1.0)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, features: Tensor) -> Tensor:
        return features.clamp(max=2.0)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient


def prepared(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def build(branch: bool = True) -> nn.Module:
        network = Small(branch)
        change(network)
        return network

    return build


def attention(network: Any, images: Tensor) -> Tensor:
    tokens = network.conv(images).flatten(2).transpose(1, 2)[:, None]
    return network.fc(scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(1))


def multi_head(network: Any, images: Tensor) -> Tensor:
    tokens = network.conv(images).flatten(2).transpose(1, 2)
    return network.fc(network.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def fills_cache(network: Any, features: Tensor) -> Tensor:
    if "scale" not in network.cache:
        network.cache["scale"] = network.fc.weight.sum(0)
    return network.fc(features * network.cache["scale"])


def calls_functional(network: Any, features: Tensor) -> Tensor:
    changed = {"weight": network.fc.weight * 2, "bias": network.fc.bias}
    return torch.func.functional_call(network.fc, changed, (features,))


def lazy(network: Any) -> None:
    network.fc = nn.LazyLinear(CLASSES)
    network(torch.zeros(1, 3, 12, 12))


def ties(network: Any) -> None:
    network.other = nn.Linear(WIDTH, CLASSES)
    network.other.weight = network.fc.weight


VALID: dict[str, Callable[..., nn.Module]] = {
    "nothing unusual": Small,
    "a subclass that adds nothing": type("Same", (Small,), {}),
    "a bound of the logits": small(lambda n, f: n.bounded(f)),
    "a choice by value": small(lambda n, f: torch.where(n.fc(f) > n.limit, n.fc(f) * 0.5, n.fc(f))),
    "channels last": prepared(lambda n: n.to(memory_format=torch.channels_last)),
    "a transposed weight": prepared(transpose_weight),
    "a tied weight": small(lambda n, f: n.fc(f) + n.other(f.sqrt()), ties),
    "a buffer outside of the state dict": small(
        lambda n, f: n.fc(f * n.scale), buffer("scale", torch.arange(float(WIDTH)), persistent=False)
    ),
    "a parametrization": prepared(
        lambda n: parametrize.register_parametrization(n.fc, "weight", Normalized())
    ),
    "weight norm": prepared(lambda n: parametrizations.weight_norm(n.fc)),
    "a custom function": small(lambda n, f: n.fc(Clamp.apply(f))),
    "checkpointing": small(lambda n, f: n.fc(checkpoint(torch.tanh, f, use_reentrant=False))),
    "vmap": small(lambda n, f: torch.func.vmap(lambda row: n.fc(row * row.sum()))(f)),
    "functional_call": small(calls_functional),
    "an operation in place": small(lambda n, f: n.fc(f.clone().mul_(2).relu_())),
    "a slice that is written": small(lambda n, f: n.fc(torch.cat([f[:, :4], f[:, 4:].sigmoid_()], 1))),
    "a cache of a weight": small(fills_cache, holds("cache", dict)),
    "an initialized lazy layer": prepared(lazy),
    "a gate of the two largest": small(
        lambda n, f: n.fc(torch.zeros_like(f).scatter(1, f.topk(2).indices, f.topk(2).values.softmax(1)))
    ),
    "attention": with_forward(attention),
    "multi-head attention": with_forward(
        multi_head, lambda n: n.add_module("mix", nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    ),
    "attention over the first dimension": with_forward(
        lambda n, x: n.fc(n.mix(*[n.conv(x).flatten(2).permute(2, 0, 1)] * 3)[0].mean(0)),
        lambda n: n.add_module("mix", nn.MultiheadAttention(WIDTH, 2)),
    ),
    "a recurrent layer": with_forward(
        lambda n, x: n.fc(n.rows(n.conv(x).mean(2).transpose(1, 2))[0][:, -1]),
        lambda n: n.add_module("rows", nn.GRU(WIDTH, WIDTH, batch_first=True)),
    ),
    "flattened images": with_forward(
        lambda n, x: n.head(x.reshape(x.shape[0], -1)),
        lambda n: n.add_module("head", nn.Linear(432, CLASSES)),
    ),
    "an einsum over the batch": small(
        lambda n, f: n.fc(torch.einsum("bi,ij->bj", f, n.fc.weight.T @ n.fc.weight))
    ),
    "a covariance": with_forward(
        lambda n, x: n.head(torch.einsum("bchw,bdhw->bcd", n.conv(x), n.conv(x)).flatten(1) / 144),
        lambda n: n.add_module("head", nn.Linear(WIDTH * WIDTH, CLASSES)),
    ),
    "a small constant": small(lambda n, f: n.fc(f * torch.tensor([0.5] * WIDTH))),
    "padding and a strided convolution": with_forward(
        lambda n, x: n.fc(
            conv2d(nn.functional.pad(x, (1, 2, 1, 2), "reflect"), n.conv.weight, stride=2).mean((2, 3))
        )
    ),
    "instance norm": with_forward(
        lambda n, x: n.fc(nn.functional.instance_norm(n.conv(x)).relu().mean((2, 3)))
    ),
    "a layer behind try": small(lambda n, f: tries(n, f)),
    "upsampling": with_forward(
        lambda n, x: n.fc(
            nn.functional.interpolate(n.conv(x), scale_factor=2, mode="bilinear").relu().mean((2, 3))
        )
    ),
}


def tries(network: Any, features: Tensor) -> Tensor:
    with suppress(AttributeError):
        return network.fc(network.missing(features))
    return network.fc(features)
