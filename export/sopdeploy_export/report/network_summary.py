"""Summarize a network for readers: its modules in order of execution, and where each branch starts.

A forward pass in train mode on the `meta` device shows which module reads whose output. The summary lists the
network's children; a child in which several training-only modules start is split into its own children.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.registry import create_model
from sopdeploy.models.stats import Counts, Tally, tally

MAX_DEPTH = 3


class Part(StrictModel):
    """One module: `shape` is its output for one image, `source` the exported module a branch starts at."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    training_only: bool = False
    source: str | None = None


class NetworkSummary(StrictModel):
    """The exported modules in order of execution, then the training-only ones, and the total counts."""

    parts: tuple[Part, ...]
    trained: Counts
    shipped: Counts


class ForwardTrace:
    """Record by forward hooks the order in which modules end, output shapes, and the source of inputs."""

    def __init__(self, network: nn.Module) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sources: dict[str, str] = {}
        self._producers: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id identifies a tensor only while the tensor lives
        self._last = ""
        self._handles = []
        for name, module in network.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(partial(self._begin, name)))
                self._handles.append(module.register_forward_hook(partial(self._end, name)))

    def _begin(self, name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        producers = [self._producers[id(value)] for value in tensors if id(value) in self._producers]
        self.sources.setdefault(name, producers[0] if producers else self._last)

    def _end(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._alive.append(output)
            self._last = name
            self._producers.setdefault(id(output), name)  # the innermost module; outer ones pass it on
            self.shapes.pop(name, None)
            self.shapes[name] = tuple(output.shape[1:])

    def close(self) -> None:
        """Remove the hooks and release the tensors."""
        for handle in self._handles:
            handle.remove()
        self._alive.clear()


def network_summary(checkpoint: Checkpoint) -> NetworkSummary:
    """Summarize the network of *checkpoint* at its input size, without allocating memory."""
    side = checkpoint.preprocess.crop
    with torch.device("meta"):
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
        plain = network.inference_model() if network.training_only else network
    shipped = tally(plain.eval(), side)
    try:
        trace, trained = _trace(network.train(), side)
    except (ConfigError, RuntimeError):  # the config forbids training
        trace, trained = _trace(network.eval(), side)
    branches = _training_only_modules(network)
    main = _exported_modules(network, branches, trace)
    modules = dict(network.named_modules())

    def total(counts: Mapping[str, int], name: str) -> int:
        return sum(count for key, count in counts.items() if is_in(key, name))

    parts = []
    for name in main:
        inner = [branch for branch in branches if is_in(branch, name)]
        # The output is that of the module inside it that ended last.
        shape = [shape for seen, shape in trace.shapes.items() if is_in(seen, name)][-1]
        parameters, macs = (
            total(counts, name) - sum(total(counts, branch) for branch in inner)
            for counts in (trained.parameters, trained.macs)
        )
        kind = type(modules[name]).__name__
        parts.append(Part(name=name, kind=kind, shape=shape, parameters=parameters, macs=macs))
    for name in branches:
        start = trace.sources.get(name, name)
        owners = [owner for owner in main if is_in(name, owner) or is_in(start, owner)]
        parts.append(
            Part(
                name=name,
                kind=type(modules[name]).__name__ if name in modules else "parameter",
                shape=trace.shapes.get(name, ()),
                parameters=total(trained.parameters, name),
                macs=total(trained.macs, name),
                training_only=True,
                source=owners[-1] if owners else None,
            )
        )
    return NetworkSummary(parts=tuple(parts), trained=trained.total(), shipped=shipped.total())


def _trace(network: Classifier, side: int) -> tuple[ForwardTrace, Tally]:
    trace = ForwardTrace(network)
    try:
        return trace, tally(network, side)
    finally:
        trace.close()


def _training_only_modules(network: Classifier) -> list[str]:
    """List the training-only modules, a container as its children."""
    modules, found = dict(network.named_modules()), []
    for name in network.training_only:
        module = modules.get(name)
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            found += [f"{name}.{child}" for child, _ in module.named_children()]
        else:
            found.append(name)
    return found


def _exported_modules(network: Classifier, branches: Collection[str], trace: ForwardTrace) -> list[str]:
    """List the exported modules that have weights or change the shape, in order of execution."""
    starts = [trace.sources.get(name, "") for name in branches]
    names = [name for name, _ in network.named_children() if name not in network.training_only]
    for _ in range(MAX_DEPTH):
        names = [child for name in names for child in _split(network, name, starts)]
    last: dict[str, int] = {}
    for position, seen in enumerate(trace.shapes):
        last.update((name, position) for name in names if is_in(seen, name))
    shown = []
    for name in last:
        changes_shape = trace.shapes.get(name) != trace.shapes.get(trace.sources.get(name, ""))
        if changes_shape or any(True for _ in network.get_submodule(name).parameters()):
            shown.append(name)
    return sorted(shown, key=lambda name: last[name])


def _split(network: nn.Module, name: str, starts: Collection[str]) -> list[str]:
    """Split module *name* into its children if branches start in more than one of them."""
    children = [f"{name}.{child}" for child, _ in network.get_submodule(name).named_children()]
    used = {child for child in children if any(is_in(start, child) for start in starts)}
    return children if len(used) > 1 else [name]
