"""Summarize a network: its modules, which of them are only for training, and their costs."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.models.base import is_in
from sopdeploy.models.registry import create_model
from sopdeploy.models.stats import Counts, tally


class Part(StrictModel):
    """One module of a network, with its parameters and its multiply-adds for one image.

    Training-only modules inside it are parts of their own.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    training_only: bool = False


class NetworkSummary(StrictModel):
    """The exported modules with weights, then the training-only ones, and the total counts."""

    parts: tuple[Part, ...]
    trained: Counts
    shipped: Counts


def summarize_checkpoint(checkpoint: Checkpoint) -> NetworkSummary:
    """Summarize the network of *checkpoint* at its input size, without allocating memory."""
    with torch.device("meta"):
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
        plain = network.inference_model() if network.training_only else network
    return summarize(network, plain, network.training_only, checkpoint.preprocess.crop)


def summarize(
    network: nn.Module, shipped: nn.Module, training_only: Collection[str], side: int
) -> NetworkSummary:
    """Summarize *network*, and count the costs of *shipped*, the network without its *training_only* parts.

    Both networks run on images of *side* x *side* pixels, on `meta` or the CPU, and may change between train
    and eval mode. If *network* fails in train mode, for example without targets, it runs in eval mode.
    """
    exported_costs = tally(shipped.eval(), side)
    with torch.random.fork_rng(devices=()):  # dropout draws random numbers
        try:
            trained = tally(network.train(), side)
        except Exception:  # the network's own code, which can raise anything
            trained = tally(network.eval(), side)
    modules, branches = dict(network.named_modules()), _training_only_modules(network, training_only)

    def count(counts: Mapping[str, int], name: str) -> int:
        inner = [branch for branch in branches if branch != name]
        return sum(number for key, number in counts.items() if is_in(key, name) and not is_in(key, *inner))

    exported = [name for name, _ in network.named_children() if name not in training_only]
    parts = [
        Part(
            name=name,
            kind=type(modules[name]).__name__ if name in modules else "parameter",
            parameters=count(trained.parameters, name),
            macs=count(trained.macs, name),
            training_only=name in branches,
        )
        for name in (*exported, *branches)
    ]
    shown = tuple(part for part in parts if part.parameters or part.training_only)
    return NetworkSummary(parts=shown, trained=trained.total(), shipped=exported_costs.total())


def _training_only_modules(network: nn.Module, training_only: Collection[str]) -> list[str]:
    """List the training-only modules, with the children of a container instead of the container."""
    modules, names = dict(network.named_modules()), []
    for name in training_only:
        module = modules.get(name)
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            names += [f"{name}.{child}" for child, _ in module.named_children()]
        else:
            names.append(name)
    return names
