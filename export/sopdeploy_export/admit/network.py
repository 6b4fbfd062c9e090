"""Checks of a network before anything runs."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule  # what torch.compile returns
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sopdeploy.errors import CertificateError, LoweringError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.models.base import is_in
from sopdeploy_export.admit.state import check_hooks
from sopdeploy_export.capture.deployed import EXPORT_LOGITS
from sopdeploy_export.network import copy_module, modules, tensors
from sopdeploy_export.state import recording_calls

WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def check_exportable(network: nn.Module, training_only: tuple[str, ...] = ()) -> None:
    """Raise `LoweringError` if a layer of *network* outside of *training_only* declares `not_exportable`."""
    for name, module in network.named_modules():
        reason = export_hints(module).not_exportable
        if reason is not None and not is_in(name, *training_only):
            raise LoweringError(f"{type(module).__name__} cannot be exported: {reason}")


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside `WRAPPERS`, such as DataParallel, and torch.compile.

    Raises `LoweringError` if torch.compile has another backend than inductor.
    """
    while isinstance(network, (OptimizedModule, *WRAPPERS)):
        if isinstance(network, OptimizedModule):
            check_backend("the network", network)
            network = network._orig_mod
        else:
            network = network.module
    return network


def check_backend(where: str, compiled: Any) -> None:
    """Raise `LoweringError` unless inductor compiled; another backend can compute anything."""
    if compiled.get_compiler_config() is None:  # only inductor has one
        raise LoweringError(f"{where} is compiled with a backend of its own; export it before it is compiled")


def unwrap_and_check(network: nn.Module, role: str) -> nn.Module:
    """Return *network*, unwrapped and not copied; raise `LoweringError` for modules that are not accepted."""
    if not isinstance(network, nn.Module):
        raise LoweringError(f"the {role} network is a {type(network).__name__}, not a torch.nn.Module")
    network = unwrap(network)
    for name, module in modules(network):
        where = f"{name} of the {role} network" if name else f"the whole {role} network"
        if isinstance(module, torch.jit.ScriptModule):
            raise LoweringError(f"{where} is a ScriptModule; export the module that was scripted or traced")
        if isinstance(module, LazyModuleMixin):
            raise LoweringError(f"{where} is not initialized; run the network once before the export")
        if isinstance(module, OptimizedModule):
            raise LoweringError(f"{where} is compiled; put its _orig_mod in its place")
        if vars(module).get("_compiled_call_impl") is not None:
            check_backend(where, vars(module)["_compiled_call_impl"])
    return network


def copy_for_export(
    network: nn.Module, role: str, logits: str | int | None = None, removed: tuple[str, ...] = ()
) -> nn.Module:
    """Copy *network*, unwrapped, to the CPU in eval mode; *logits* says which of its outputs to export.

    Raises `LoweringError` for modules and weights that the exporter does not accept, and `CertificateError`
    for hooks. Those of *removed* parts, and values of their tensors, do not matter.
    """
    network = unwrap_and_check(network, role)
    check_hooks(network, role, removed)
    for name, tensor in tensors(network).items():
        if not is_in(name, *removed):
            check_tensor(name, tensor)
    copied = copy_module(network).cpu().eval()
    if logits is not None:
        vars(copied)[EXPORT_LOGITS] = logits
    return copied


@contextmanager
def refusing_replaced_methods(network: nn.Module) -> Iterator[None]:
    """Raise `CertificateError` if the block calls a method that was replaced on a module of *network*.

    A copy of the module would still call the method with the original. Such methods are harmless where no run
    reaches them, as those of metrics, and so is the choice of another method of the same class.
    """
    replaced: dict[CodeType, str] = {}
    for name, module in modules(network):
        for attribute, value in vars(module).items():
            if not callable(value) or not callable(getattr(type(module), attribute, None)):
                continue
            if _is_own_method(module, value):
                continue
            code = _code_of(value)
            where = f"{attribute} of {f'{name} of the' if name else 'the whole'} trained network"
            if code is None:  # written in C, so its calls cannot be recorded
                raise CertificateError(f"{where} was replaced on the instance; change the class")
            replaced[code] = where
    called: list[str] = []

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code in replaced:
            called.append(replaced[frame.f_code])

    with recording_calls(record) if replaced else nullcontext():
        yield
    if called:
        raise CertificateError(f"{called[0]} was replaced on the instance; change the class")


def _is_own_method(module: nn.Module, value: Any) -> bool:
    """Return whether *value* is a method of the class of *module*, bound to it; a copy has its own."""
    methods = (method for kind in type(module).__mro__ for method in vars(kind).values())
    is_bound = getattr(value, "__self__", None) is module
    return is_bound and any(method is value.__func__ for method in methods)


def _code_of(function: Any) -> CodeType | None:
    """Return the code that a call of *function* runs; None if it is written in C."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)  # of a bound method
    for candidate in (function, type(function).__call__):  # the second one for an object that can be called
        code = getattr(candidate, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise `LoweringError` unless *tensor* has values in float32 or integers, and finite ones if it learns.

    A buffer may hold infinities, such as those of a mask; running statistics learn, too.
    """
    if tensor.is_inference():
        raise LoweringError(
            f"{name} was made in torch.inference_mode; build the network outside of it, or replace it by its "
            ".clone()"
        )
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
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
    learns = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
    is_broken = ~torch.isfinite(tensor) if learns else torch.isnan(tensor)
    if has_fractions and bool(is_broken.any()):
        raise LoweringError(f"{name} holds NaN or infinite values; train again or use an earlier checkpoint")
