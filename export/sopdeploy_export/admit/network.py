"""Checks of a network before anything runs."""

from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule  # what torch.compile returns
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sopdeploy.errors import LoweringError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.models.base import is_in
from sopdeploy_export.admit.state import check_tensors
from sopdeploy_export.capture.deployed import EXPORT_LOGITS
from sopdeploy_export.network import copy_network, modules, tensors

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
        raise LoweringError(
            f"{where} is compiled with a backend of its own; export it before it is compiled"
        )


def unwrap_and_check(network: nn.Module, role: str) -> nn.Module:
    """Return *network*, unwrapped and not copied; raise `LoweringError` for modules that are not accepted."""
    if not isinstance(network, nn.Module):
        raise LoweringError(
            f"the {role} network is a {type(network).__name__}, not a torch.nn.Module"
        )
    network = unwrap(network)
    for name, module in modules(network):
        where = f"{name} of the {role} network" if name else f"the whole {role} network"
        if isinstance(module, torch.jit.ScriptModule):
            raise LoweringError(
                f"{where} is a ScriptModule; export the module that was scripted or traced"
            )
        if isinstance(module, LazyModuleMixin):
            raise LoweringError(
                f"{where} is not initialized; run the network once before the export"
            )
        if isinstance(module, OptimizedModule):
            raise LoweringError(f"{where} is compiled; put its _orig_mod in its place")
        if vars(module).get("_compiled_call_impl") is not None:
            check_backend(where, vars(module)["_compiled_call_impl"])
    return network


def checked_copy(
    network: nn.Module,
    role: str,
    logits: str | int | None = None,
    removed: tuple[str, ...] = (),
) -> nn.Module:
    """Copy *network*, unwrapped, to the CPU in eval mode; *logits* says which of its outputs to export.

    Raises `LoweringError` for modules, and for tensors outside of *removed* parts, that are not
    accepted.
    """
    network = unwrap_and_check(network, role)
    check_tensors(network, removed)
    copied = copy_network(network).cpu().eval()
    if logits is not None:
        vars(copied)[EXPORT_LOGITS] = logits
    return copied


def tensors_with_nan(network: nn.Module, removed: tuple[str, ...]) -> list[str]:
    """List the tensors of *network* outside of *removed* parts that hold NaN, or infinity if they learn.

    A buffer may hold infinities, such as those of a mask; running statistics learn, too.
    """
    broken = []
    for name, tensor in tensors(network).items():
        learns = isinstance(tensor, nn.Parameter) or name.endswith(
            ("running_mean", "running_var")
        )
        is_broken = ~torch.isfinite(tensor) if learns else torch.isnan(tensor)
        if bool(is_broken.any()) and not is_in(name, *removed):
            broken.append(name)
    return broken
