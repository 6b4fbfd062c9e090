"""What a network must be before it can be proved: in eval mode, without hooks, plainly laid out."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from sopdeploy.errors import CertificateError
from sopdeploy_export.accounts import tensors

Network = TypeVar("Network", bound=nn.Module)


def refuse_train_mode(network: nn.Module, role: str) -> None:
    """Refuse a network of which any part is in train mode."""
    for name, part in network.named_modules():
        if part.training:
            raise CertificateError(
                f"the {role} network is in train mode ({name or 'the whole of it'}); call .eval() first"
            )


def refuse_hooks(network: nn.Module, role: str) -> None:
    """Refuse forward hooks: code beside the network that no file would carry.

    One registered on all modules would change the plain network too, and so hide from the comparison.
    """
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        raise CertificateError("a forward hook is registered on all modules; remove it before the export")
    for name, part in network.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise CertificateError(
                f"the {role} network has a forward hook on {name or 'the whole of it'}; remove it first"
            )


def standard_layout(network: Network) -> Network:
    """Return *network*, or a copy of it, with every tensor in the standard memory layout."""
    if all(tensor.is_contiguous() for tensor in tensors(network).values()):
        return network
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)
