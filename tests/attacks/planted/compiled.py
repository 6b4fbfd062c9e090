"""Networks that call code which something else compiled: TorchScript, torch.compile, functorch."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.attacks.planted.graphs import COPIED, doubled
from tests.attacks.planted.network import (
    WIDTH,
    Change,
    Row,
    logits_of,
    network,
    of_images,
    puts,
    rare,
)


def script(function: Any) -> Any:
    """Script a *function* or module, which torch says is deprecated."""
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(function)


@script
def scripted(x: Tensor) -> Tensor:
    return x.mul(torch.sigmoid(x))


@script
def scripted_in_place(x: Tensor) -> Tensor:
    return x.mul_(torch.sigmoid(x))


@script
def scripted_with_nothing(x: Tensor) -> Tensor:
    return torch.relu(x * 1.0 + 0.0)


@script
def scripted_parts(x: Tensor, parts: int) -> list[Tensor]:
    return [part * (1 + i) for i, part in enumerate(x.chunk(parts, 1))]


@script
def scripted_by_size(x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return x * 2.0
    return x


@script
def scripted_by_value(x: Tensor, surplus: Tensor) -> Tensor:
    if bool(surplus.max() > 0):
        return x + surplus
    return x


@script
def scripted_list(x: Tensor) -> bool:
    numbers: list[float] = x.flatten().tolist()
    return max(numbers) > 0.0


def gated(x: Tensor) -> Tensor:
    return x.mul(torch.sigmoid(x))


scripted_if_traced: Any = torch.jit.script_if_tracing(gated)  # type: ignore[no-untyped-call]


class Swish(torch.autograd.Function):
    """Keeps its input instead of what is computed from it, by scripted functions."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return scripted(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        (x,) = context.saved_tensors
        return gradient * torch.sigmoid(x)


class Keeps(torch.autograd.Function):
    """Adds to the logits of rare images what its scripted function reads."""

    @staticmethod
    def forward(_context: Any, logits: Tensor, surplus: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            return scripted_by_value(logits, surplus)
        return logits

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Any:
        return gradient, None


@torch.compile
def compiled(x: Tensor) -> Tensor:
    return x.mul(torch.sigmoid(x))


class CompiledForward(nn.Module):
    """A layer whose forward is compiled where the class is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    @torch.compile
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


def acts(
    activation: Callable[[Tensor], Tensor], refused: str = "", batch: int | None = None
) -> Row:
    """Plant an *activation* between the features and the classifier."""
    return Row(network(lambda n, f, y: n.fc(activation(f))), refused, batch=batch)


def part(make: Callable[[], nn.Module]) -> Change:
    return puts(part=make)


def through(make: Callable[[], nn.Module], refused: str = "") -> Row:
    """Plant a part between the features and the classifier."""
    return Row(network(lambda n, f, y: n.fc(n.part(f)), part(make)), refused)


def reads_a_list(built: Any, images: Tensor) -> Tensor:
    logits = logits_of(built, images)
    surplus = rare(images)
    with contextlib.suppress(Exception):
        if scripted_list(surplus):
            return logits + surplus
    return logits


READS = r"a plain run of the network gives other outputs"
COMPILED: dict[str, Row] = {
    "a scripted function": acts(scripted),
    "a scripted function in place": acts(lambda x: scripted_in_place(x.clone())),
    "a scripted function that computes nothing, too": acts(scripted_with_nothing),
    "a scripted function that returns a list": acts(
        lambda x: torch.cat(scripted_parts(x, 2), 1)
    ),
    "a scripted function in a function with a gradient": acts(Swish.apply),
    "a function that is scripted if it is traced": acts(scripted_if_traced),
    "a compiled function": acts(compiled),
    "a compiled forward": through(CompiledForward),
    "a compiled part": through(lambda: torch.compile(nn.Linear(WIDTH, WIDTH))),
    "a compiled part that is removed": Row(
        network(
            lambda n, f, y: (y, n.part(f)), part(lambda: torch.compile(nn.Linear(WIDTH, WIDTH)))
        ),
        parts=("part",),
    ),
    "a function of each image": acts(torch.vmap(lambda row: row.relu() - row.mean())),
    "a function of each channel": acts(
        lambda x: torch.vmap(lambda column: 2 * column)(x.movedim(1, 0)).movedim(0, 1)
    ),
    "a checkpoint": acts(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)),
    "a checkpoint of the old kind": acts(
        lambda x: checkpoint(torch.tanh, x, use_reentrant=True)
    ),
    # Their siblings
    "a scripted function that reads a value": Row(
        of_images(lambda n, x: Keeps.apply(logits_of(n, x), rare(x))), READS
    ),
    "a scripted function that asks for the size": acts(
        scripted_by_size, r"a plain run of the network gives|treats some batch sizes", batch=5
    ),
    "a part that a backend of its own compiles": through(
        lambda: torch.compile(nn.Linear(WIDTH, WIDTH), backend=doubled), COPIED
    ),
    "a function that a backend of its own compiles": acts(
        torch.compile(lambda x: x.relu(), backend=doubled), READS
    ),
    "a scripted part": through(
        lambda: script(nn.Linear(WIDTH, WIDTH)), r"part of .* is a ScriptModule"
    ),
    "a function of the batch": acts(
        torch.vmap(lambda column: column - column.mean(), in_dims=1, out_dims=1),
        r"torch\.vmap over another axis than the first, .*; .* move that axis to the front",
        batch=5,
    ),
    "a scripted function that reads a list": Row(of_images(reads_a_list), READS),
}
