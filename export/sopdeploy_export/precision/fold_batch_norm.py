"""Fold batch norms into the convolutions before them, in float64.

y = s (W x) + t is the convolution (s W) x + t. Weights that are rounded once, after folding, lose less than
with the ONNX converter, which folds rounded weights and does not support bfloat16. A batch norm is folded
only if the captured program shows that nothing else reads the convolution.
"""

import torch
from torch import nn
from torch.export import ExportedProgram

from sopdeploy_export.graph.onnx_export import PREFIX

CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def fold_batch_norms(network: nn.Module, program: ExportedProgram) -> int:
    """Fold the batch norms of *network* in place; return the number of folds."""
    signature, folds = program.graph_signature, 0
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.target is not BATCH_NORM or node.args[0].target not in CONVOLUTIONS or node.args[1] is None:
            continue
        weights = names.get(node.args[0].args[1].name), names.get(node.args[1].name)
        if len(node.args[0].users) != 1 or None in weights:
            continue
        convolution_name, norm_name = (
            str(weight).removeprefix(PREFIX).rpartition(".")[0] for weight in weights
        )
        convolution, norm = network.get_submodule(convolution_name), network.get_submodule(norm_name)
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            fold(convolution, norm)
            owner, _, leaf = norm_name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, nn.Identity())
            folds += 1
    return folds


@torch.no_grad()
def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Multiply *norm* into the weights and bias of *convolution*."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
    original = 0.0 if convolution.bias is None else convolution.bias.double()
    bias = (original - mean.double()) * scale + norm.bias.double()
    kernel = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight = nn.Parameter(kernel.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)
