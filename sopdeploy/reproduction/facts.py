"""Count what a table prints about a network besides errors: blocks, branches, convolutions, map sizes."""

import re
from collections.abc import Collection, Iterable

import torch
from torch import nn

from sopdeploy.models.base import Classifier
from sopdeploy.models.dsop import DSoP

CONVOLUTION = re.compile(r"conv\d$")  # of a block, not of its shortcut or a reduction of channels
LAYERS = {  # a layer as a paper names it, and the module that computes it; for a stage, its last block
    "conv1": "conv1",
    "pool1": "maxpool",
    "conv2_x": "layer1",
    "conv3_x": "layer2",
    "conv4_x": "layer3",
    "conv5_x": "layer4",
}


def count_facts(network: Classifier, side: int, names: Collection[str]) -> dict[str, float]:
    """Count the facts *names* of *network*, on the `meta` device, for images of *side* pixels.

    Facts "per stage" are counted in the first stage, because all stages of these networks are equal. Facts
    that cannot be counted, such as hours on other GPUs, are left out.
    """
    facts: dict[str, float] = {}
    stage = getattr(network, "layer1", None)
    if isinstance(stage, nn.Sequential):
        branches = dict(network.branches.named_children()) if isinstance(network, DSoP) else {}
        of_stage = [branch for name, branch in branches.items() if name.startswith("layer1")]
        facts = {
            "blocks per stage": len(stage),
            "branches per stage": len(of_stage),
            "branches": len(branches),
            "convolutions per stage": _convolutions([stage]),
            "convolutions of branches per stage": _convolutions(of_stage),
        }
    if any(" after " in name for name in names):
        facts |= _map_sizes(network, side)
    return {name: facts[name] for name in names if name in facts}


def _map_sizes(network: Classifier, side: int) -> dict[str, float]:
    """Return the side in pixels and the channels of the output of each layer in `LAYERS`."""
    sizes: dict[str, float] = {}
    for name, attribute in LAYERS.items():
        module = getattr(network, attribute, None)
        if module is not None:
            last = module[-1] if isinstance(module, nn.Sequential) else module
            last.register_forward_hook(
                lambda _module, _inputs, output, name=name: sizes.update(
                    {f"side after {name}": output.shape[-1], f"channels after {name}": output.shape[1]}
                )
            )
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    return sizes


def _convolutions(modules: Iterable[nn.Module]) -> int:
    return sum(
        isinstance(module, nn.Conv2d) and CONVOLUTION.search(name) is not None
        for part in modules
        for name, module in part.named_modules()
    )
