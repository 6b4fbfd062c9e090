"""The state of torch, of modules and of their memory, which the comparisons of a proof cannot see.

A wrong state, such as active autocast or a forward hook, would change the plain network in the
same way as the trained one, or would not be captured.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sopdeploy.backbones.base import Backbone
from sopdeploy.errors import CertificateError, LoweringError
from sopdeploy.models.base import is_in
from sopdeploy_export.network import modules, tensors


def check_torch_state() -> None:
    """Reject another default type than float32, autocast, torch modes and hooks on all modules.

    These change the operations of every network in the same way: the three networks would
    agree, but the exported file would compute something else. Raises `CertificateError` with
    the name of the mode.
    """
    if torch.get_default_dtype() != torch.float32:
        raise CertificateError(
            f"torch.set_default_dtype({torch.get_default_dtype()}) is active; set it back to torch.float32"
        )
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise CertificateError(
                f"torch.autocast is active for {device}; export outside of it"
            )
    for kind, modes in (
        ("function", _get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
        ("dispatch", _get_current_dispatch_mode_stack()),
    ):
        if modes:
            name = type(modes[-1]).__name__
            raise CertificateError(
                f"the torch {kind} mode {name} is active; export outside of it"
            )
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        raise CertificateError(
            "a forward hook is registered on all modules; remove it before the export"
        )


def find_oddity(
    network: nn.Module, role: str, removed: tuple[str, ...] = (), *, with_methods: bool = True
) -> str | None:
    """Describe a hook, a replaced method or train mode of a module outside of *removed* parts; None if none.

    *network* is in eval mode as far as its code lets it. Without *with_methods*, methods are
    not looked at.
    """
    for name, module in modules(network):
        if is_in(name, *removed):
            continue
        where = name or "the whole network"
        if module._forward_hooks or module._forward_pre_hooks:
            remedy = (
                "remove it first, or register a method of the module in place of a function"
            )
            return f"the {role} network has a forward hook on {where}; {remedy}"
        if with_methods and (replaced := _replaced_method(module)):
            where = f"{name} of the" if name else "the whole"
            remedy = "change the class, or bind a function of self with types.MethodType"
            return (
                f"{replaced} of {where} {role} network was replaced on the instance; {remedy}"
            )
        if module.training:
            remedy = "call .eval() first"
            if type(module).train is not nn.Module.train:
                remedy = "keeps it there after .eval(): replace it by a layer that does not"
                remedy = f"{type(module).__name__}.train() {remedy}"
            return f"the {role} network is in train mode ({where}); {remedy}"
    return None


def _replaced_method(module: nn.Module) -> str | None:
    """Name a method of the class of *module* that the instance has in another form; None if there is none.

    Another method of the same class, bound to *module*, is no other form: a copy has its own.
    """
    methods = [method for kind in type(module).__mro__ for method in vars(kind).values()]
    for attribute, value in vars(module).items():
        if callable(value) and callable(getattr(type(module), attribute, None)):
            is_bound = getattr(value, "__self__", None) is module
            if not (is_bound and any(method is value.__func__ for method in methods)):
                return attribute
    return None


def check_network_state(network: nn.Module, role: str, removed: tuple[str, ...] = ()) -> None:
    """Check the tensors of *network*, as `check_tensors` does, and a network of the catalog by `find_oddity`.

    Its code has no hooks, and its outputs are computed without those of the whole network.
    Raises `CertificateError` for these and for train mode; of its methods, the proof judges.
    """
    if isinstance(network, Backbone):
        odd = find_oddity(network, role, removed, with_methods=False)
        if odd is not None:
            raise CertificateError(odd)
    check_tensors(network, removed)


def check_tensors(network: nn.Module, removed: tuple[str, ...] = ()) -> None:
    """Raise `LoweringError` if `check_tensor` does for a tensor of *network* outside of *removed* parts."""
    for name, tensor in tensors(network).items():
        if not is_in(name, *removed):
            check_tensor(name, tensor)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise `LoweringError` unless *tensor* is dense, of float32 or integers, and not of inference mode."""
    if tensor.is_inference():  # its values cannot be replaced, as `randomized` does
        remedy = "build the network outside of it, or replace it by its .clone()"
        raise LoweringError(f"{name} was made in torch.inference_mode; {remedy}")
    dense = (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )
    has_fractions = tensor.is_floating_point() or tensor.is_complex()
    if not dense or (has_fractions and tensor.dtype != torch.float32):
        kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout} on {tensor.device}"
        advice = "convert it, for example with .float(), and choose the precision of the export"
        if tensor.is_meta:
            advice = "load its values"
        elif tensor.layout != torch.strided:
            advice = "replace it by its .to_dense()"
        elif tensor.is_complex():  # of which .float() would keep the real part only
            advice = "keep its torch.view_as_real, and call torch.view_as_complex in forward"
        raise LoweringError(
            f"{name} is a {kind}; the exporter accepts dense tensors of float32 or integers: {advice}"
        )
    if tensor.is_neg():
        remedy = "replace it by its .resolve_neg()"
        raise CertificateError(
            f"{name} is a negated view, whose memory holds other numbers; {remedy}"
        )
