"""What must hold before anything is captured: the state of torch, of the modules and of their memory.

Each of these would change the plain network in the same way as the trained one, or would not be captured,
so that the comparisons of the certificate could not show it.
"""

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sopdeploy.errors import CertificateError

AUTOCAST_DEVICES = ("cpu", "cuda")
Network = TypeVar("Network", bound=nn.Module)


def modules(
    network: nn.Module, name: str = "", outside: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Yield *network* and every module in it, each under all of its dotted names.

    This reads torch's own tables, because a class can override `named_modules`. Raises `CertificateError` if
    a module contains itself.
    """
    if any(network is outer for outer in outside):
        raise CertificateError(f"{name} contains itself; a network must be a tree of modules")
    yield name, network
    for child, module in network._modules.items():
        if module is not None:
            yield from modules(module, f"{name}.{child}" if name else child, (*outside, network))


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Map every name of every parameter and buffer of *network* to its tensor, parameters first."""
    owners = list(modules(network))
    return {
        f"{owner}.{name}" if owner else name: tensor
        for table in ("_parameters", "_buffers")
        for owner, module in owners
        for name, tensor in vars(module)[table].items()
        if tensor is not None
    }


def check_torch_state() -> None:
    """Reject autocast, function modes, dispatch modes and hooks on all modules.

    They change the operations of every network, so all three networks would agree on something that no
    exported file computes. Raises `CertificateError` with the name of the mode.
    """
    for device in AUTOCAST_DEVICES:
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


def check_hooks(network: nn.Module, role: str) -> None:
    """Raise `CertificateError` if a module of *network* has a forward hook."""
    for name, module in modules(network):
        if module._forward_hooks or module._forward_pre_hooks:
            raise CertificateError(
                f"the {role} network has a forward hook on {name or 'the whole network'}; remove it first"
            )


def check_network_state(network: nn.Module, role: str) -> None:
    """Reject train mode, forward hooks, and tensors whose memory does not hold their values.

    Raises `CertificateError` that names *role* and the module or tensor.
    """
    for name, module in modules(network):
        if module.training:
            raise CertificateError(
                f"the {role} network is in train mode ({name or 'the whole network'}); call .eval() first"
            )
    check_hooks(network, role)
    for name, tensor in tensors(network).items():
        where = f"the {role} network's {name}"
        if tensor.is_meta:
            raise CertificateError(f"{where} has no values (device meta); load its weights first")
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise CertificateError(f"{where} has the layout {layout}; replace it by its .to_dense()")
        for lazy, view, remedy in (
            (tensor.is_neg(), "negated", ".resolve_neg()"),
            (tensor.is_conj(), "conjugated", ".resolve_conj()"),
        ):
            if lazy:
                raise CertificateError(
                    f"{where} is a {view} view, whose memory holds other numbers; replace it by its {remedy}"
                )


def contiguous(network: Network) -> Network:
    """Copy *network* with contiguous tensors if one is not, because strides appear in captured graphs."""
    if all(tensor.is_contiguous() for tensor in tensors(network).values()):
        return network
    copied = copy.deepcopy(network)
    for tensor in tensors(copied).values():
        tensor.data = tensor.detach().contiguous()
    return copied


def check_removed_memory(removed: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Reject a removed tensor whose memory overlaps that of a kept one, wherever their storages start.

    Raises `CertificateError` with both names.
    """
    owners = [(name, *_addresses(tensor)) for name, tensor in kept.items()]
    for name, tensor in removed.items():
        start, end = _addresses(tensor)
        for owner, first, last in owners:
            if start < last and first < end:
                raise CertificateError(
                    f"{name} was removed but shares its memory with {owner}, which was kept"
                )


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of *tensor* and the one after its last; an empty tensor has none."""
    if not tensor.numel():
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
