"""The anatomy of a network for a reader: its parts in the order of computing, and where each branch starts.

Nothing is declared twice: a forward pass in train mode on `meta` tells which part took whose output. A part
is a child of the network; a child in which several training-only parts start is shown child by child.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model
from sopdeploy.models.stats import Counts, Tally, tally
from sopdeploy.module_names import is_in

DEEPEST = 3  # levels of children that may be shown one by one


class Part(StrictModel):
    """One box: `shape` is that of its output for one image, `source` the shipped part a leaver starts at."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    leaves: bool = False
    source: str | None = None


class NetworkSummary(StrictModel):
    """The parts in the order of computing, those that leave after them, and what all of them cost."""

    parts: tuple[Part, ...]
    trained: Counts
    shipped: Counts


class Watched:
    """What forward hooks saw: modules in the order of ending, shapes of outputs, where inputs came from."""

    def __init__(self, network: nn.Module) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sources: dict[str, str] = {}
        self._makers: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id is that of one tensor only as long as the tensor lives
        self._last = ""
        self._handles = [
            handle
            for name, module in network.named_modules()
            if name
            for handle in (
                module.register_forward_pre_hook(lambda _m, inputs, name=name: self._began(name, inputs)),
                module.register_forward_hook(lambda _m, _i, output, name=name: self._ended(name, output)),
            )
        ]

    def _began(self, name: str, inputs: tuple[Any, ...]) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        makers = [self._makers[id(value)] for value in tensors if id(value) in self._makers]
        self.sources.setdefault(name, makers[0] if makers else self._last)

    def _ended(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self._alive.append(output)
            self._last = name
            self._makers.setdefault(id(output), name)  # the innermost: what lies around it passes it on
            self.shapes.pop(name, None)
            self.shapes[name] = tuple(output.shape[1:])

    def stop(self) -> None:
        """Take the hooks off and let the tensors go."""
        for handle in self._handles:
            handle.remove()
        self._alive.clear()


def network_summary(checkpoint: Checkpoint) -> NetworkSummary:
    """Return the anatomy of the network of *checkpoint* at the size that it takes; nothing is allocated."""
    side = checkpoint.preprocess.crop
    with torch.device("meta"):
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
        plain = network.inference_model() if network.training_only else network
    shipped = tally(plain.eval(), side)
    watched, trained = watch(network, side)
    leavers = training_only_parts(network)
    main = main_parts(network, leavers, watched)
    return NetworkSummary(
        parts=(
            *(part(network, name, leavers, watched, trained) for name in main),
            *(leaver(network, name, main, watched, trained) for name in leavers),
        ),
        trained=trained.total(),
        shipped=shipped.total(),
    )


def watch(network: Classifier, side: int) -> tuple[Watched, Tally]:
    """Return what a forward pass showed: in train mode, or in eval mode where its config forbids to train."""
    try:
        return watched_pass(network.train(), side)
    except (ConfigError, RuntimeError):
        return watched_pass(network.eval(), side)


def watched_pass(network: Classifier, side: int) -> tuple[Watched, Tally]:
    """Return what a forward pass in the mode that *network* is in showed, and its counts."""
    watched = Watched(network)
    try:
        return watched, tally(network, side)
    finally:
        watched.stop()


def training_only_parts(network: Classifier) -> list[str]:
    """Return the names of what leaves: the children of a container one by one."""
    found = []
    for name in network.training_only:
        whole = dict(network.named_modules()).get(name)
        if isinstance(whole, nn.ModuleDict | nn.ModuleList):
            found += [f"{name}.{child}" for child, _ in whole.named_children()]
        else:
            found.append(name)
    return found


def main_parts(network: Classifier, leavers: Collection[str], watched: Watched) -> list[str]:
    """Return the names of the parts that ship, in the order of computing, without those that only pass on."""
    starts = [watched.sources.get(name, "") for name in leavers]
    names = [name for name, _ in network.named_children() if name not in network.training_only]
    for _ in range(DEEPEST):
        names = [child for name in names for child in children_of(network, name, starts)]
    order = list(watched.shapes)
    ended = {name: [at for at, seen in enumerate(order) if is_in(seen, name)] for name in names}
    weighty = [name for name in names if ended[name] and has_weights(network, name, watched)]
    return sorted(weighty, key=lambda name: ended[name][-1])


def children_of(network: nn.Module, name: str, starts: Collection[str]) -> list[str]:
    """Return the children of part *name* where several of *starts* lie in it, else the name itself."""
    children = [f"{name}.{child}" for child, _ in network.get_submodule(name).named_children()]
    inside = {child for child in children if any(is_in(start, child) for start in starts)}
    return children if len(inside) > 1 else [name]


def has_weights(network: nn.Module, name: str, watched: Watched) -> bool:
    """Say whether part *name* is worth a box: it has weights, or changes the shape of what it takes."""
    if any(True for _ in network.get_submodule(name).parameters()):
        return True
    return watched.shapes.get(name) != watched.shapes.get(watched.sources.get(name, ""))


def part(network: nn.Module, name: str, leavers: Collection[str], watched: Watched, counted: Tally) -> Part:
    """Return the box of shipped part *name* without the leavers in it.

    Its output is that of the last module in it that ended.
    """
    shapes = [shape for seen, shape in watched.shapes.items() if is_in(seen, name)]
    inner = [leaver for leaver in leavers if is_in(leaver, name)]
    return Part(
        name=name,
        kind=type(network.get_submodule(name)).__name__,
        shape=shapes[-1],
        parameters=summed(counted.parameters, name) - sum(summed(counted.parameters, one) for one in inner),
        macs=summed(counted.macs, name) - sum(summed(counted.macs, one) for one in inner),
    )


def leaver(network: nn.Module, name: str, main: Collection[str], watched: Watched, counted: Tally) -> Part:
    """Return the box of training-only part *name* and the shipped part it starts at or belongs to."""
    start = watched.sources.get(name, name)
    owners = [owner for owner in main if is_in(name, owner) or is_in(start, owner)]
    whole = dict(network.named_modules()).get(name)
    return Part(
        name=name,
        kind="parameter" if whole is None else type(whole).__name__,
        shape=watched.shapes.get(name, ()),
        parameters=summed(counted.parameters, name),
        macs=summed(counted.macs, name),
        leaves=True,
        source=owners[-1] if owners else None,
    )


def summed(counts: Mapping[str, int], name: str) -> int:
    """Return the sum of *counts* over what lies in part *name*."""
    return sum(count for key, count in counts.items() if is_in(key, name))
