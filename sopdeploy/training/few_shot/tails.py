"""Tails: networks cut before their last stage, which fine-tuning trains from cached inputs of that stage."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.dsop import DSoP
from sopdeploy.training.few_shot.config import FineTuningConfig
from sopdeploy.training.few_shot.features import last_stage, record_input
from sopdeploy.training.few_shot.networks import NEUTRAL_SCALE, with_gsop_block
from sopdeploy.training.fine_tuning import classifier_name

TOLERANCE = 1e-3  # largest difference between the features of tail and network, relative to the largest one
STATISTICS_BATCH = 64


@dataclass(frozen=True, slots=True)
class Tail:
    """A way of fine-tuning: `model`, cut from `network`, computes logits from the input of the last stage.

    Attributes:
        name: What is trained.
        network: The complete network.
        model: The cut copy, with the heads whose losses are trained.
        new: Dotted names of the parts without pretrained weights.
        scale: Factor on the input of the classifier, compared with the network that the head was fitted to.
        catalog: Name of the network in the catalog, if it is not that of the recipe.
    """

    name: str
    network: Classifier
    model: Classifier
    new: tuple[str, ...] = ()
    scale: float = 1.0
    catalog: str | None = None


def make_tails(
    catalog: str, network: Classifier, inputs: Tensor, vectors: Tensor, config: FineTuningConfig, seed: int
) -> list[Tail]:
    """Build the tails of *network*, whose catalog name is *catalog*; empty if the network cannot be cut.

    The first tail is the network without branches. If enabled and available for this network, tails with the
    branches of DSoP that read the last stage and with a GSoP block follow. *inputs* (B, C, H, W) of the last
    stage and *vectors* (B, D), the input of the classifier, are those of a few images.
    """
    plain = cut_before_last_stage(network, inputs, vectors)
    if plain is None:
        return []
    tails = [Tail("fine-tuning", network, plain)]
    if config.branches and isinstance(network, DSoP):
        model = cut_before_last_stage(network, inputs, vectors, branches=True)
        if model is not None and "branches" in model._modules:
            tails.append(Tail("fine-tuning with branches", network, model, ("branches",)))
    block = with_gsop_block(catalog, network, seed) if config.gsop else None
    if block is not None:
        model = cut_before_last_stage(block.network, inputs, NEUTRAL_SCALE * vectors)
        if model is not None:
            name, new = "fine-tuning with a GSoP block", (block.place,)
            tails.append(Tail(name, block.network, model, new, NEUTRAL_SCALE, block.name))
    return tails


def cut_before_last_stage(
    model: Classifier, stage_input: Tensor, vector: Tensor, *, branches: bool = False
) -> Classifier | None:
    """Copy *model* so that its copy computes logits from the input of the last stage.

    Modules before that stage become identities. With *branches*, the DSoP branches that read this stage
    remain; all other branches are removed. *stage_input* (B, C, H, W) and *vector* (B, D), the input of the
    classifier, were computed by *model*. Returns `None` if the copy does not compute *vector* from
    *stage_input*, for example because `forward` of *model* also computes something outside of its modules.
    """
    stage = last_stage(model)
    tail = _copy_with_branches(model, stage if branches else None)
    parent: nn.Module = tail
    for name in stage.split("."):
        for child in list(parent._modules):
            if child == name:
                break
            if not is_in(classifier_name(model), child):
                empty = isinstance(parent._modules[child], nn.Sequential) and parent is tail
                parent._modules[child] = nn.Sequential() if empty else nn.Identity()
        parent = parent.get_submodule(name)
    try:
        with torch.no_grad(), record_input(tail.get_submodule(classifier_name(tail))) as found:
            tail.eval()(stage_input.clone())
    except (RuntimeError, AttributeError, TypeError, IndexError):
        return None
    same = found and torch.allclose(found[0], vector, rtol=0, atol=TOLERANCE * float(vector.abs().max()))
    return tail if same else None


def _copy_with_branches(model: Classifier, stage: str | None) -> Classifier:
    """Copy *model* with only those of its branches that read *stage*; without *stage*, with none."""
    branches = model._modules.pop("branches", None)  # not copied: several times as large as the network
    try:
        copied = copy.deepcopy(model)
    finally:
        if branches is not None:
            model._modules["branches"] = branches
    if isinstance(copied, DSoP) and isinstance(branches, nn.ModuleDict):
        copied.taps = {tap: name for tap, name in copied.taps.items() if stage and is_in(tap, stage)}
        if copied.taps:
            kept = {name: copy.deepcopy(branches[name]) for name in copied.taps.values()}
            copied.branches = nn.ModuleDict(kept)
    return copied


@torch.no_grad()
def measure_statistics(tail: Classifier, parts: Sequence[str], inputs: Tensor) -> None:
    """Set the running statistics of batch norms in *parts* of *tail* to those of *inputs* (N, C, H, W)."""
    norms = [
        module
        for name, module in tail.named_modules()
        if is_in(name, *parts) and isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    device = next(tail.parameters()).device
    for part in torch.tensor_split(inputs, -(-len(inputs) // STATISTICS_BATCH)):
        tail.heads(part.to(device))
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
        norm.eval()


def copy_tail(tail: Classifier, network: Classifier) -> None:
    """Copy the tensors of *tail*, a cut copy of *network*, to *network*."""
    network.load_state_dict({**network.state_dict(), **tail.state_dict()})
