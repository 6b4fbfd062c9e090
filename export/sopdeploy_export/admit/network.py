"""Checks of a network before anything runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule  # what torch.compile returns
from torch.nn.modules import module as nn_module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sopdeploy.base.environment import memory_limit
from sopdeploy.bundle.manifest import Precision
from sopdeploy.errors import CertificateError, LoweringError, NoMemoryError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.models.backbones.base import Backbone
from sopdeploy.models.base import is_in
from sopdeploy_export.admit.parts import match_parts
from sopdeploy_export.capture.deployed import EXPORT_LOGITS
from sopdeploy_export.network import (
    attributes_restored,
    contents_restored,
    modules,
    tensors,
    tensors_converted,
)

# Of the weights in the file of a graph, which protobuf limits to 2**31 - 1 bytes with the nodes
MAX_GRAPH_BYTES = 2**31 - 2**24
# Memory of an export: what it takes without weights, and how many times the weights (networks.md)
MEMORY_AT_REST = 800_000_000
MEMORY_FACTOR = 4
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def check_exportable(network: nn.Module, training_only: tuple[str, ...]) -> None:
    """Raise `LoweringError` if a layer of *network* outside of *training_only* declares `not_exportable`."""
    for name, module in network.named_modules():
        reason = export_hints(module).not_exportable
        if reason is not None and not is_in(name, *training_only):
            raise LoweringError(f"{type(module).__name__} cannot be exported: {reason}")


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside wrappers: `WRAPPERS`, such as DataParallel, and that of torch.compile.

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
    """Raise `LoweringError` if *compiled*, made by torch.compile, has another backend than inductor.

    Such a backend can compute anything. *where* names the module in the message.
    """
    if compiled.get_compiler_config() is None:  # only inductor has one
        raise LoweringError(
            f"{where} is compiled with a custom backend; export it before it is compiled"
        )


def unwrap_and_check(
    network: object, role: str, training_only: Sequence[str] = ()
) -> nn.Module:
    """Return *network*, unwrapped; raise `LoweringError` for modules that are not accepted.

    Modules that match *training_only* are not checked; raises `DetachError` for an item that matches
    none. *role* is that of the network in messages, such as `trained`.
    """
    if not isinstance(network, nn.Module):
        raise LoweringError(
            f"the {role} network is a {type(network).__name__}, not a torch.nn.Module"
        )
    network = unwrap(network)

    # The outputs of a network of the catalog are computed by its methods, not by calling it.
    has_hook = network._forward_hooks or network._forward_pre_hooks
    if isinstance(network, Backbone) and (has_hook or "forward" in vars(network)):
        raise LoweringError(
            f"the {role} network has a hook or a replaced forward, which a network of the catalog does not "
            "use for its outputs; remove it"
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise LoweringError(
            f"the whole {role} network is a ScriptModule; export the module that "
            "was scripted or traced"
        )

    # Modules that cannot be read, run or captured.
    parts = match_parts(network, training_only)
    for name, module in modules(network):
        if is_in(name, *parts):
            continue
        where = f"{name} of the {role} network" if name else f"the whole {role} network"
        if isinstance(module, LazyModuleMixin):
            raise LoweringError(
                f"{where} is not initialized; run the network once before the export"
            )
        if isinstance(module, OptimizedModule):
            check_backend(where, module)
        if vars(module).get("_compiled_call_impl") is not None:  # by `module.compile()`
            check_backend(where, vars(module)["_compiled_call_impl"])
    return network


@contextmanager
def prepared(
    network: object, training_only: Sequence[str] = (), logits_key: str | int | None = None
) -> Iterator[nn.Module]:
    """Unwrap *network*, and prepare it for the block: on the CPU, in eval mode, uncompiled.

    Afterwards, the network is as before. *logits_key* says which of its outputs to export. A hook, a
    replaced method or a part in train mode is not a reason to refuse a network, except a hook or a
    `forward` on a whole network of the catalog. But if the block raises `CertificateError` or
    `LoweringError`, the message also names such an oddity, which can be the cause. Raises
    `LoweringError` for modules that are not accepted, and `DetachError` for *training_only*.
    """
    unwrapped = unwrap_and_check(network, "trained", training_only)
    parts = match_parts(unwrapped, training_only)

    with (
        attributes_restored(unwrapped),
        contents_restored(unwrapped),
        tensors_converted(unwrapped, _on_cpu),
    ):
        unwrapped.eval()
        for _, module in modules(unwrapped):
            vars(module)["_compiled_call_impl"] = None
        if logits_key is not None:
            # Not by `setattr`, which a class can define.
            vars(unwrapped)[EXPORT_LOGITS] = logits_key

        oddity = find_oddity(unwrapped, parts)
        try:
            yield unwrapped
        except (CertificateError, LoweringError) as error:
            if oddity is not None:
                error.message += f"; one reason can be that {oddity}"
            raise


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cpu or tensor.is_meta else tensor.cpu()


def check_torch_state() -> None:
    """Reject another default type than float32, autocast, torch modes and global forward hooks.

    These change the operations of every network in the same way: the compared networks would
    agree, but the exported file would compute something else. Raises `CertificateError` with
    the name of what is active.
    """
    # Types.
    if torch.get_default_dtype() != torch.float32:
        raise CertificateError(
            f"torch.set_default_dtype({torch.get_default_dtype()}) is active; set "
            "it back to torch.float32"
        )
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise CertificateError(
                f"torch.autocast is active for {device}; export outside of it"
            )

    # Modes, which can change every call of a torch function, or of an operator.
    modes_by_kind = {
        "function": _get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
        "dispatch": _get_current_dispatch_mode_stack(),
    }
    for kind, modes in modes_by_kind.items():
        if modes:
            name = type(modes[-1]).__name__
            raise CertificateError(
                f"the torch {kind} mode {name} is active; export outside of it"
            )

    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        raise CertificateError(
            "a forward hook is registered on all modules; remove it before the export"
        )


def find_oddity(network: nn.Module, removed: tuple[str, ...]) -> str | None:
    """Describe the first oddity of a module of *network* outside of *removed* parts; None if there is none.

    An oddity is a hook, a replaced method, a FakeQuantize module, or a module that is still in
    train mode after `eval`. A ScriptModule counts in removed parts, too: these can still run, and
    no capture can enter it.
    """
    for name, module in modules(network):
        if isinstance(module, torch.jit.ScriptModule):
            return (
                f"{name} of the trained network is a ScriptModule; put the module "
                "that was scripted or traced in its place or, if only training "
                "needs it, run it only if self.training"
            )
        if is_in(name, *removed):
            continue

        if any(kind.__name__ == "FakeQuantizeBase" for kind in type(module).__mro__):
            return (
                f"{name} of the trained network is a {type(module).__name__}, which "
                "reads its own buffers; put torch.nn.Identity in its place, and "
                "quantize with precision int8"
            )

        # Changes of the instance, which its class does not show.
        where = name or "the whole network"
        if module._forward_hooks or module._forward_pre_hooks:
            remedy = (
                "remove it first, or register a method of the module in place of a function"
            )
            return f"the trained network has a forward hook on {where}; {remedy}"

        method = _replaced_method(module)
        if method is not None:
            owner = f"{name} of the" if name else "the whole"  # before "trained network"
            remedy = "change the class, or bind a function of self with types.MethodType"
            return f"{method} of {owner} trained network was replaced on the instance; {remedy}"

        # `eval` has been called: the module itself, or one around it, keeps it in train mode.
        if module.training:
            remedy = "a module around it does not pass .eval() on: call it there for all parts"
            if type(module).train is not nn.Module.train:
                keeps = "keeps it there after .eval(): replace it by a layer that does not"
                remedy = f"{type(module).__name__}.train() {keeps}"
            return f"the trained network is in train mode ({where}); {remedy}"

    return None


def _replaced_method(module: nn.Module) -> str | None:
    """Name a method of the class of *module* that an attribute of the instance hides; None if there is none.

    An attribute that is a method of the class, bound to *module*, does not count: in a copy, it is
    bound to the copy.
    """
    methods = [method for kind in type(module).__mro__ for method in vars(kind).values()]

    for attribute, value in vars(module).items():
        hides_method = callable(value) and callable(getattr(type(module), attribute, None))
        if hides_method:
            is_bound = getattr(value, "__self__", None) is module
            is_of_class = is_bound and any(method is value.__func__ for method in methods)
            if not is_of_class:
                return attribute

    return None


def weight_bytes(network: nn.Module, removed: tuple[str, ...]) -> int:
    """Return the bytes of the tensors of *network* outside of *removed* parts, each counted once."""
    kept = {
        id(tensor): tensor
        for name, tensor in tensors(network).items()
        if not is_in(name, *removed)
    }
    return sum(tensor.nbytes for tensor in kept.values())


def check_size(num_bytes: int, precision: Precision) -> tuple[str, ...]:
    """Return a warning if the export of *num_bytes* of weights probably needs more memory than there is.

    Raises `NoMemoryError` if the weights do not fit into the memory twice, in the network and in the
    runtime, and `LoweringError` if they are too many for int8.
    """
    if precision == "int8" and num_bytes > MAX_GRAPH_BYTES:
        raise LoweringError(
            f"int8 is for networks of at most {MAX_GRAPH_BYTES / 1e9:.2f} GB, and this one has "
            f"{num_bytes / 1e9:.2f} GB of weights; choose precision fp16"
        )

    problems = warn_of_memory(num_bytes)
    if problems and MEMORY_AT_REST + 2 * num_bytes > memory_limit():
        raise NoMemoryError(f"{problems[0]}; use a machine with more memory")
    return problems


def warn_of_memory(num_bytes: int) -> tuple[str, ...]:
    """Return a warning if the export of *num_bytes* of weights probably needs more memory than there is."""
    needed = memory_of_export(num_bytes)
    limit = memory_limit()
    if needed <= limit:
        return ()
    return (
        f"the export of {num_bytes / 1e9:.1f} GB of weights needs at least about {needed / 1e9:.1f} GB of "
        f"memory, and this machine or its container has {limit / 1e9:.1f} GB",
    )


def memory_of_export(num_bytes: int) -> int:
    """Estimate the memory that an export of *num_bytes* of weights needs."""
    return MEMORY_AT_REST + MEMORY_FACTOR * num_bytes


def check_tensors(network: nn.Module, removed: tuple[str, ...] = ()) -> None:
    """Check each tensor of *network* outside of *removed* parts with `check_tensor`; raises its errors."""
    for name, tensor in tensors(network).items():
        if not is_in(name, *removed):
            check_tensor(name, tensor)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise an error unless *tensor* is dense, of float32 or integers, and holds its own values.

    This is a `LoweringError` if the tensor has another class, layout or type, has no values, or was
    made in inference mode. It is a `CertificateError` if the tensor is a negated view.
    """
    if tensor.is_inference():  # its values cannot be replaced
        remedy = "build the network outside of it, or replace it by its .clone()"
        raise LoweringError(f"{name} was made in torch.inference_mode; {remedy}")

    is_dense = (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )
    has_fractions = tensor.is_floating_point() or tensor.is_complex()
    if not is_dense or (has_fractions and tensor.dtype != torch.float32):
        kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise LoweringError(
            f"{name} is a {kind}; the exporter accepts dense tensors of float32 or "
            f"integers: {_advise(tensor)}"
        )

    # Bytes of memory are hashed and written, and here these are not the values.
    if tensor.is_neg():
        remedy = "replace it by its .resolve_neg()"
        raise CertificateError(
            f"{name} is a negated view, whose memory holds other numbers; {remedy}"
        )


def _advise(tensor: Tensor) -> str:
    """Say how to make a dense tensor of float32 of *tensor*, which `check_tensor` refuses."""
    if tensor.is_meta:
        return "load its values"
    if tensor.layout != torch.strided:
        return "replace it by its .to_dense()"
    if tensor.is_complex():  # of which .float() would keep the real part only
        return "keep its torch.view_as_real, and call torch.view_as_complex in forward"
    return "convert it, for example with .float(), and choose the precision of the export"
