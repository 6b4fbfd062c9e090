"""The state of torch, of modules and of their memory, which the comparisons of a proof cannot see.

A wrong state, such as active autocast or a forward hook, would change the plain network in the same way as
the trained one, or would not be captured.
"""

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sopdeploy.errors import CertificateError
from sopdeploy.models.base import is_in
from sopdeploy_export.network import modules, tensors

REMOVED_BY = {  # the function that removes a hook of this class in torch.nn.utils
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "BasePruningMethod": "torch.nn.utils.prune.remove",
}


def check_torch_state() -> None:
    """Reject another default type than float32, autocast, torch modes and hooks on all modules.

    These change the operations of every network in the same way: the three networks would agree, but the
    exported file would compute something else. Raises `CertificateError` with the name of the mode.
    """
    if torch.get_default_dtype() != torch.float32:
        raise CertificateError(
            f"torch.set_default_dtype({torch.get_default_dtype()}) is active; set it back to torch.float32"
        )
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise CertificateError(f"torch.autocast is active for {device}; export outside of it")
    for kind, modes in (
        ("function", _get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
        ("dispatch", _get_current_dispatch_mode_stack()),
    ):
        if modes:
            name = type(modes[-1]).__name__
            raise CertificateError(f"the torch {kind} mode {name} is active; export outside of it")
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        raise CertificateError("a forward hook is registered on all modules; remove it before the export")


def check_hooks(network: nn.Module, role: str, removed: tuple[str, ...] = ()) -> None:
    """Raise `CertificateError` if a module of *network* outside of its *removed* parts has a forward hook."""
    for name, module in modules(network):
        if is_in(name, *removed):
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            where = name or "the whole network"
            hook, *_ = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
            kind = next((kind for kind in type(hook).__mro__ if kind.__name__ in REMOVED_BY), None)
            remedy = "remove it first" if kind is None else f"call {REMOVED_BY[kind.__name__]} first"
            raise CertificateError(f"the {role} network has a forward hook on {where}; {remedy}")


def check_network_state(network: nn.Module, role: str, removed: tuple[str, ...] = ()) -> None:
    """Raise `CertificateError` for train mode, hooks, or a tensor whose memory does not hold its values.

    Modes and hooks of the *removed* parts do not matter.
    """
    for name, module in modules(network):
        if module.training and not is_in(name, *removed):
            remedy = "call .eval() first"
            if type(module).train is not nn.Module.train:
                kind = type(module).__name__
                remedy = f"{kind}.train() keeps it there after .eval(): replace it by a layer that does not"
            where = name or "the whole network"
            raise CertificateError(f"the {role} network is in train mode ({where}); {remedy}")
    check_hooks(network, role, removed)
    for name, tensor in tensors(network).items():
        where = f"the {role} network's {name}"
        if tensor.is_meta:
            raise CertificateError(f"{where} has no values (device meta); load its weights first")
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise CertificateError(f"{where} has the layout {layout}; replace it by its .to_dense()")
        if tensor.is_neg() or tensor.is_conj():
            view, resolve = "conjugated", "resolve_conj"
            if tensor.is_neg():
                view, resolve = "negated", "resolve_neg"
            remedy = f"replace it by its .{resolve}()"
            raise CertificateError(f"{where} is a {view} view, whose memory holds other numbers; {remedy}")
