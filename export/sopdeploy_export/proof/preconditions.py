"""What a network must be to ship and to be proved: in eval mode, without hooks, plainly laid out."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from sopdeploy.errors import CertificateError, DetachError, LoweringError
from sopdeploy.models.base import Classifier
from sopdeploy_export.proof.tensor_inventory import tensors

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


def refuse_training_parts(trained: Classifier) -> Classifier:
    """Return *trained*, which must have no part that only training needs."""
    if trained.training_only:
        raise DetachError(
            f"{type(trained).__name__} still carries parts that only training needs "
            f"({', '.join(trained.training_only)}); add --detach to take them off with proof"
        )
    return trained


def refuse_what_cannot_ship(trained: Classifier) -> None:
    """Refuse a network with a part that says of itself that it has no form every runtime takes."""
    for part in trained.modules():
        reason = getattr(part, "not_exportable", None)
        if reason is not None:
            raise LoweringError(f"{type(part).__name__} cannot be exported: {reason}")
