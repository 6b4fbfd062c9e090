"""Checks of a user's network before anything is proved, so that each problem has its own message.

The certificate would reject most of these networks too, but with a message about graphs and hashes.
"""

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import CertificateError, ConfigError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy_export.graph import PREFIX, Deployed, capture_any_batch, probe_images
from sopdeploy_export.proof.hashes import program_root
from sopdeploy_export.proof.preconditions import tensors

WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "AveragedModel": "module"}
COMPILED = "_orig_mod"  # the attribute of torch.compile's wrapper
IMAGES = 4  # probes that are computed eagerly
TENSOR_TABLES = ("_parameters", "_buffers", "_modules")
SHOWN = 3
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Usage:
    """Which tensors of a network its output depends on."""

    used: frozenset[str]
    unused: frozenset[str]


def unwrap(network: nn.Module) -> nn.Module:
    """Take *network* out of DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while True:
        attribute = WRAPPERS.get(type(network).__name__)
        attribute = COMPILED if hasattr(network, COMPILED) else attribute
        if attribute is None:
            return network
        network = getattr(network, attribute)


def copy_for_export(network: nn.Module, role: str) -> nn.Module:
    """Copy *network*, unwrapped, to the CPU in eval mode.

    Raises `LoweringError` if it is not a module, cannot be copied, or holds weights that the exporter does
    not accept: ScriptModules, lazy or meta tensors, types other than float32, NaN.
    """
    if not isinstance(network, nn.Module):
        raise LoweringError(f"the {role} network is a {type(network).__name__}, not a torch.nn.Module")
    network = unwrap(network)
    if isinstance(network, torch.jit.ScriptModule):
        raise LoweringError(
            f"the {role} network is a ScriptModule, which cannot be captured again; export the module that "
            "it was scripted or traced from"
        )
    for name, tensor in tensors(network).items():
        check_tensor(name, tensor)
    try:
        return copy.deepcopy(network).cpu().eval()
    except Exception as error:  # `__deepcopy__` of the user's modules can raise anything
        raise LoweringError(f"the {role} network cannot be copied: {first_line(error)}") from error


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise `LoweringError` unless *tensor* has finite values in float32, or integers."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise LoweringError(f"{name} is not initialized; run the network once before the export")
    if tensor.is_meta:
        raise LoweringError(f"{name} is on the meta device and has no values; load the weights first")
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != torch.float32):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LoweringError(f"{name} is {kind}; call .float() first and choose --precision for the export")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LoweringError(f"{name} holds NaN or infinite values; train again or use an earlier checkpoint")


def check_methods(network: nn.Module, role: str) -> None:
    """Raise `CertificateError` if a method of a module was replaced on the instance."""
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            replaced = isinstance(value, types.FunctionType | types.MethodType)
            if replaced and callable(getattr(type(module), attribute, None)):
                where = f"{name}.{attribute}" if name else attribute
                raise CertificateError(
                    f"{where} of the {role} network was replaced on the instance; a proof covers the code of "
                    "the class, so put the change into a class"
                )


def check_outputs(deployed: Deployed, preprocess: Preprocess, classes: int, role: str) -> tuple[str, ...]:
    """Run the network on probe images, alone and together, and check shape, finiteness and state.

    Returns warnings. Raises `LoweringError` if the network cannot run, returns no (B, classes) logits, or
    changes itself.
    """
    images = torch.from_numpy(probe_images(preprocess)[-IMAGES:])
    logits = torch.empty(0)
    for size in (IMAGES, 1, IMAGES):  # a cache may fill in the first run, and must not change afterwards
        before = _python_state(deployed.network)
        try:
            with torch.no_grad():
                logits = deployed(images[:size])[0]
        except LoweringError:
            raise
        except Exception as error:  # the user's code
            raise LoweringError(
                f"the {role} network fails for {size} images of 3 x {preprocess.crop} x {preprocess.crop}: "
                f"{first_line(error)}"
            ) from error
        _check_shape(logits, size, classes, role)
    changed = _first_change(before, _python_state(deployed.network))
    if changed is not None:
        raise LoweringError(
            f"{changed} changes while the {role} network runs; an exported network must be stateless"
        )
    if not bool(torch.isfinite(logits).all()):
        raise LoweringError(f"the {role} network returns NaN or infinite logits for probe images")
    if bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all()):
        return (
            f"the {role} network ends in a softmax, and the service applies another one: export the network "
            "without it",
        )
    return ()


def _check_shape(logits: Tensor, size: int, classes: int, role: str) -> None:
    """Raise `LoweringError` unless *logits* are (size, classes)."""
    shape = tuple(logits.shape)
    if size == 1 and shape == (classes,):
        raise LoweringError(
            f"the {role} network drops the batch dimension for a batch of one; use flatten(1), not squeeze()"
        )
    if len(shape) != 2 or shape[0] != size:
        raise LoweringError(f"the {role} network returns {shape} for {size} images, not ({size}, classes)")
    if shape[1] != classes:
        raise LoweringError(f"the {role} network returns {shape[1]} logits, but there are {classes} labels")


def find_usage(network: nn.Module, preprocess: Preprocess, batch: BatchRange | None = None) -> Usage:
    """Capture *network*, in eval mode, and find the tensors that its output depends on.

    Raises `LoweringError` if it cannot be captured, `CertificateError` if it is not deterministic or writes
    to its buffers.
    """
    network = copy.deepcopy(network)  # capturing may leave traces in caches
    root = program_root(capture_any_batch(network, preprocess, batch or BatchRange()))
    used = frozenset(name.removeprefix(PREFIX) for name in root.state)
    # Counters such as `num_batches_tracked` belong to modules that are used.
    owners = {name.rpartition(".")[0] for name in used}
    unused = {
        name
        for name, tensor in tensors(network).items()
        if name not in used and (tensor.is_floating_point() or name.rpartition(".")[0] not in owners)
    }
    return Usage(used, frozenset(unused))


def unused_parts(network: nn.Module, usage: Usage) -> tuple[str, ...]:
    """Name the outermost modules and tensors of *network* that its output does not depend on."""
    found: list[str] = []
    for name, module in network.named_modules():
        inside = {f"{name}.{inner}" if name else inner for inner in tensors(module)}
        if inside and inside <= usage.unused and not any(is_in(name, part) for part in found):
            found.append(name)
    return (*found, *sorted(name for name in usage.unused if not is_in(name, *found)))


def check_training_only(usage: Usage, training_only: Sequence[str]) -> None:
    """Raise `CertificateError` if the output depends on a tensor of the *training_only* parts."""
    reached = sorted(name for name in usage.used if is_in(name, *training_only))
    if reached:
        parts = [part for part in training_only if any(is_in(name, part) for name in reached)]
        more = f" and {len(reached) - SHOWN} more" if len(reached) > SHOWN else ""
        raise CertificateError(
            f"the output of the trained network depends on {', '.join(reached[:SHOWN])}{more}, so "
            f"{', '.join(parts)} cannot be detached; remove it from --training-only"
        )


def check_builder(build: Callable[[], nn.Module], trained: nn.Module) -> None:
    """Raise if *build* fails, or if two results of it, or one and *trained*, share a module or memory."""
    first, second = _build(build), _build(build)
    owners = {id(part) for network in (first, trained) for part in network.modules()}
    memory = {
        tensor.data_ptr()
        for network in (first, trained)
        for tensor in tensors(network).values()
        if tensor.numel()
    }
    for name, part in second.named_modules():
        if id(part) in owners:
            raise CertificateError(
                f"the builder of the plain network returns the same module {name or 'object'} twice; it must "
                "build a new network in every call"
            )
    for name, tensor in tensors(second).items():
        if tensor.numel() and tensor.data_ptr() in memory:
            raise CertificateError(
                f"the builder of the plain network returns the same tensor {name} twice; it must build a new "
                "network in every call"
            )


def _build(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        network = build()
    except Exception as error:  # the user's code
        raise ConfigError(f"the builder of the plain network fails: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"the builder of the plain network returns a {type(network).__name__}, not a module"
        )
    return unwrap(network)


def first_line(error: BaseException) -> str:
    """Shorten *error* to its type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _python_state(network: nn.Module) -> dict[str, Any]:
    """Collect the attributes of all modules besides parameters, buffers and children."""
    return dict(_attributes(network))


def _attributes(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in TENSOR_TABLES:
                where = f"{name}.{attribute}" if name else attribute
                yield where, (value, len(value) if isinstance(value, list | dict | set) else None)


def _first_change(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Name the first attribute that was added, removed, replaced or grew."""
    for name in (*before, *(name for name in after if name not in before)):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old[1] != new[1]:
            return name
        simple = isinstance(old[0], bool | int | float | str | tuple)
        if old[0] is not new[0] and not (simple and old[0] == new[0]):
            return name
    return None
