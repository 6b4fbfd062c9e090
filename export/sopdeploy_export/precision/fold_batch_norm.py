"""Batch norms folded into the convolutions before them, in float64, before weights are rounded.

y = s (W x) + t is the convolution (s W) x + t. Rounded once, after folding, the weights lose less than the
converter's folding of rounded weights, and it cannot fold bfloat16. Only where the captured graph shows
that nobody but the batch norm reads the convolution.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.export import ExportedProgram

CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
PREFIX = "network."


def pairs(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Yield the names of a convolution and of the batch norm that alone reads it."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.target is not NORM or node.args[0].target not in CONVOLUTIONS or node.args[1] is None:
            continue
        convolution = node.args[0]
        weights = names.get(convolution.args[1].name), names.get(node.args[1].name)
        if len(convolution.users) == 1 and None not in weights:
            yield tuple(str(name).removeprefix(PREFIX).rpartition(".")[0] for name in weights)  # type: ignore[misc]


def fold_norms(network: nn.Module, program: ExportedProgram) -> int:
    """Fold the batch norms of *network*, of which *program* is the graph; return how many."""
    folded = 0
    for convolution_name, norm_name in list(pairs(program)):
        convolution, norm = network.get_submodule(convolution_name), network.get_submodule(norm_name)
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            fold(convolution, norm)
            owner, _, leaf = norm_name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, nn.Identity())
            folded += 1
    return folded


@torch.no_grad()
def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give *convolution* the weights and bias that make *norm* after it the identity."""
    assert norm.running_mean is not None  # noqa: S101 - for the type; `pairs` gives such norms only
    assert norm.running_var is not None  # noqa: S101
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    before = 0.0 if convolution.bias is None else convolution.bias.double()
    bias = (before - norm.running_mean.double()) * scale + norm.bias.double()
    kernel = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight = nn.Parameter(kernel.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)
