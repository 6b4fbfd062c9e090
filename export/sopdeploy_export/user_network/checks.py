"""Checks of a user's network before anything is proved, so that each problem has its own message.

The certificate would reject most of these networks too, but with a message about graphs and hashes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule  # what torch.compile returns
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sopdeploy.errors import CertificateError, ConfigError, LoweringError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy_export.graph import EXPORT_LOGITS, PREFIX, Captured, Deployed, InFloat64, probe_images
from sopdeploy_export.proof.hashes import program_root
from sopdeploy_export.proof.networks import check_hooks, modules, tensors

WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
IMAGES = 4  # probes that are computed eagerly
TENSOR_TABLES = ("_parameters", "_buffers", "_modules")
SHOWN = 3
SUM_TOLERANCE = 1e-3
ALONE_TOLERANCE = 1e-6  # of the largest logit in float64, between an image alone and in a batch
DEPTH = 4  # levels of nested lists and dicts in which changes are detected


class Usage(NamedTuple):
    """The names of the tensors that the output of a network depends on, and of all other tensors."""

    used: frozenset[str]
    unused: frozenset[str]


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while isinstance(network, (OptimizedModule, *WRAPPERS)):
        network = network._orig_mod if isinstance(network, OptimizedModule) else network.module
    return network


def copy_for_export(network: nn.Module, role: str, logits: str | int | None = None) -> nn.Module:
    """Copy *network*, unwrapped, to the CPU in eval mode; *logits* says which of its outputs to export.

    Raises `LoweringError` if it is not a module, cannot be copied, or holds weights that the exporter does
    not accept: ScriptModules, quantized modules, lazy or meta tensors, types other than float32, NaN. Raises
    `CertificateError` for hooks and replaced methods.
    """
    if not isinstance(network, nn.Module):
        raise LoweringError(f"the {role} network is a {type(network).__name__}, not a torch.nn.Module")
    network = unwrap(network)
    for name, module in modules(network):
        check_module(name, module, role)
    check_hooks(network, role)
    named = tensors(network)
    for name, tensor in named.items():
        check_tensor(name, tensor)
    check_containers(network, role, {id(tensor) for tensor in named.values()})
    try:
        copied = copy.deepcopy(network)
        copied.cpu()
        returned = copied.eval(), copied.train(False)
    except Exception as error:  # methods of the user's modules can raise anything
        raise LoweringError(f"the {role} network cannot be copied: {first_line(error)}") from error
    if any(result is not copied for result in returned):
        raise LoweringError(
            f"train() or eval() of the {role} network does not return self; return self in both methods"
        )
    own = {id(module) for _, module in modules(copied)}
    for name, module in modules(network):
        if id(module) in own:
            raise LoweringError(
                f"{name or 'the whole network'} of the {role} network is not copied by copy.deepcopy; remove "
                "its __deepcopy__"
            )
    if logits is not None:
        vars(copied)[EXPORT_LOGITS] = logits
    return copied


def check_module(name: str, module: nn.Module, role: str) -> None:
    """Raise `LoweringError` if *module* cannot be captured, `CertificateError` if a method was replaced."""
    kind, where = type(module), f"{name or 'the whole'} of the {role} network"
    if isinstance(module, torch.jit.ScriptModule):
        raise LoweringError(
            f"{where} is a ScriptModule, which cannot be captured again; export the module that it was "
            "scripted or traced from"
        )
    if isinstance(module, LazyModuleMixin):
        raise LoweringError(f"{where} is not initialized; run the network once before the export")
    if kind.__module__.startswith(QUANTIZED):
        raise LoweringError(f"{where} is quantized; export the float32 network with --precision int8")
    if kind.__name__.startswith(("FullyShardedDataParallel", "FSDP")):
        raise LoweringError(f"{where} is sharded by FSDP; load its full state dict into an unsharded network")
    if isinstance(module, OptimizedModule):
        raise LoweringError(f"{where} is compiled; put its _orig_mod in its place")
    for attribute, value in vars(module).items():
        if callable(value) and callable(getattr(kind, attribute, None)):
            raise CertificateError(
                f"{name}{'.' if name else ''}{attribute} of the {role} network was replaced on the instance; "
                "a proof covers the code of the class, so put the change into a class"
            )


def check_containers(network: nn.Module, role: str, registered: set[int]) -> None:
    """Raise `LoweringError` if an attribute holds modules whose tensors are not *registered* in *network*."""
    for name, module in modules(network):
        for attribute, value in vars(module).items():
            if attribute in TENSOR_TABLES or not isinstance(value, list | tuple | set | Mapping):
                continue
            items = value.values() if isinstance(value, Mapping) else value
            inside = [part for part in items if isinstance(part, nn.Module)]
            if any(id(tensor) not in registered for part in inside for tensor in tensors(part).values()):
                where = f"{name}.{attribute}" if name else attribute
                raise LoweringError(
                    f"{where} of the {role} network is a {type(value).__name__} of modules, in which torch "
                    "does not find their weights; use ModuleList or ModuleDict"
                )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise `LoweringError` unless *tensor* has finite values in float32, or integers."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested or tensor.is_quantized:
        kind = "quantized tensor" if tensor.is_quantized else type(tensor).__name__
        raise LoweringError(f"{name} is a {kind}, not a plain tensor; load its values into a plain network")
    if tensor.is_meta:
        raise LoweringError(f"{name} is on the meta device and has no values; load the weights first")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise LoweringError(f"{name} has the layout {layout}; replace it by its .to_dense()")
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != torch.float32):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LoweringError(f"{name} is {kind}; call .float() first and choose --precision for the export")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LoweringError(f"{name} holds NaN or infinite values; train again or use an earlier checkpoint")


def check_outputs(deployed: Deployed, preprocess: Preprocess, classes: int, role: str) -> tuple[str, ...]:
    """Run the network on probe images, alone and together, and check shape, finiteness and state.

    Returns warnings. Raises `LoweringError` if the network cannot run, returns no (B, classes) logits or
    changes its state, or if the logits of an image depend on other images or on the number of runs.
    """
    images = torch.from_numpy(probe_images(preprocess)[-IMAGES:])
    runs: list[Tensor] = []
    for size in (IMAGES, 1, IMAGES):  # a cache may fill in the first run, and must not change afterwards
        before = _python_state(deployed.network)
        logits = _run(deployed, images[:size], role)
        _check_shape(logits, size, classes, role)
        runs.append(logits)
    changed = _first_change(before, _python_state(deployed.network))
    if changed is not None:
        raise LoweringError(
            f"{changed} changes while the {role} network runs; an exported network must be stateless"
        )
    first, _, logits = runs
    if not bool(torch.isfinite(logits).all()):
        raise LoweringError(f"the {role} network returns NaN or infinite logits for probe images")
    if not torch.equal(first, logits):
        raise LoweringError(
            f"the {role} network returns other logits when it runs again; it must not use random numbers or "
            "count its calls"
        )
    exact = copy.deepcopy(deployed).double()  # without rounding, which would hide small influences
    with InFloat64():
        alone, together = (_run(exact, images[:size], role, " in float64") for size in (1, IMAGES))
    if not bool(((alone - together[:1]).abs() <= ALONE_TOLERANCE * together.abs().max()).all()):
        raise LoweringError(
            f"the {role} network returns other logits for an image alone than in a batch; no image may "
            "depend on the others"
        )
    warnings = []
    if torch.equal(logits, logits[:1].expand_as(logits)):
        warnings.append(
            f"the {role} network returns the same logits for every probe image, so a comparison of outputs "
            "cannot detect errors; is it trained?"
        )
    if bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all()):
        warnings.append(
            f"the {role} network ends in a softmax, and the service applies another one: export the network "
            "without it"
        )
    return tuple(warnings)


def _run(deployed: Deployed, images: Tensor, role: str, where: str = "") -> Tensor:
    """Compute the logits of *images*; all errors of the user's code become `LoweringError`."""
    try:
        with torch.no_grad():
            logits: Tensor = deployed(images)[0]
    except LoweringError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        count, height, width, channels = images.shape
        raise LoweringError(
            f"the {role} network fails for {count} images of {channels} x {height} x {width}{where}: "
            f"{first_line(error)}"
        ) from error
    return logits


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
        raise LoweringError(
            f"the {role} network returns {shape[1]} logits, but there are {classes} labels"
            "; give one label per logit"
        )


def find_usage(network: nn.Module, captured: Captured) -> Usage:
    """Find the tensors that the output of *network* depends on, according to its *captured* programs.

    Raises `CertificateError` if the programs are not deterministic or write to buffers.
    """
    programs = (captured.any_batch, captured.batch_of_one)
    reached = {name.removeprefix(PREFIX) for each in programs for name in program_root(each).state}
    named = tensors(network)
    tied = {id(named[name]) for name in reached if name in named}
    used = frozenset(name for name, tensor in named.items() if id(tensor) in tied)
    # Counters such as `num_batches_tracked` belong to modules that are used.
    owners = {name.rpartition(".")[0] for name in used}
    unused = {
        name
        for name, tensor in named.items()
        if name not in used and (tensor.is_floating_point() or name.rpartition(".")[0] not in owners)
    }
    return Usage(used, frozenset(unused))


def outermost(network: nn.Module, unused: frozenset[str]) -> tuple[str, ...]:
    """Name the outermost modules of *network* with only *unused* tensors, then the other unused tensors."""
    found: list[str] = []
    for name, module in modules(network):
        inside = {f"{name}.{inner}" if name else inner for inner in tensors(module)}
        if inside and inside <= unused and not is_in(name, *found):
            found.append(name)
    return (*found, *sorted(name for name in unused if not is_in(name, *found)))


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
    """Check that *build* returns a new network in every call.

    Raises `ConfigError` if it fails, and `CertificateError` if its networks share a module or memory with
    each other or with *trained*.
    """
    first, second = _build(build), _build(build)
    owners = {id(part) for network in (first, trained) for _, part in modules(network)}
    memory = {
        tensor.data_ptr()
        for network in (first, trained)
        for tensor in tensors(network).values()
        if tensor.numel()
    }
    for name, part in modules(second):
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
    except (Exception, SystemExit) as error:  # the user's code
        raise ConfigError(f"the builder of the plain network fails: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"the builder of the plain network returns a {type(network).__name__}, not a module"
        )
    return unwrap(network)


def _python_state(network: nn.Module) -> dict[str, Any]:
    """Collect the attributes of all modules, except parameters, buffers and children."""
    return dict(_attributes(network))


def _attributes(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in modules(network):
        for attribute, value in vars(module).items():
            if attribute not in TENSOR_TABLES:
                yield f"{name}.{attribute}" if name else attribute, _freeze(value, DEPTH)


def _freeze(value: Any, depth: int) -> Any:
    """Convert *value* to a comparable form that differs after any change of the value or its contents."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return id(value), value._version
    if depth and isinstance(value, Mapping):
        return [(repr(key), _freeze(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, list | tuple):
        return [_freeze(item, depth - 1) for item in value]
    return id(value), len(value) if isinstance(value, set) else 0


def _first_change(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Name the first attribute that was added, removed or changed."""
    for name in (*before, *(name for name in after if name not in before)):
        if name not in before or name not in after or before[name] != after[name]:
            return name
    return None
