"""Checks of a user's network before anything is proved: its modules, its tensors and its outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule  # what torch.compile returns
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sopdeploy.errors import CertificateError, LoweringError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import EXPORT_LOGITS, STATELESS, Deployed, InFloat64, probe_images
from sopdeploy_export.proof.networks import check_hooks, copy_module
from sopdeploy_export.state import InPlaceWrites, PythonReads, first_change, modules, read_state, tensors

WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
IMAGES = 4  # probes that are computed eagerly
SUM_TOLERANCE = 1e-3  # of probabilities
NO_GRAPH = "a graph has one path for all images and layouts, as with torch.where"
SAME_LOGITS = "returns the same logits for every probe image; is it trained?"
SOFTMAX = "ends in a softmax, and the service applies another one: export the network without it"
ALONE_TOLERANCE = 1e-6  # of the largest logit in float64, between an image alone and in a batch


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while isinstance(network, (OptimizedModule, *WRAPPERS)):
        if isinstance(network, OptimizedModule):
            check_backend("the network", network)
        network = network._orig_mod if isinstance(network, OptimizedModule) else network.module
    return network


def check_backend(where: str, compiled: Any) -> None:
    """Raise `LoweringError` unless inductor compiled; another backend can compute anything."""
    if compiled.get_compiler_config() is None:
        raise LoweringError(f"{where} is compiled with a backend of its own; export it before it is compiled")


def copy_for_export(network: nn.Module, role: str, logits: str | int | None = None) -> nn.Module:
    """Copy *network*, unwrapped, to the CPU in eval mode; *logits* says which of its outputs to export.

    Raises `LoweringError` for modules and weights that the exporter does not accept, and `CertificateError`
    for hooks and replaced methods.
    """
    if not isinstance(network, nn.Module):
        raise LoweringError(f"the {role} network is a {type(network).__name__}, not a torch.nn.Module")
    network = unwrap(network)
    for name, module in modules(network):
        check_module(f"{name} of the {role} network" if name else f"the whole {role} network", module)
    check_hooks(network, role)
    for name, tensor in tensors(network).items():
        check_tensor(name, tensor)
    copied = copy_module(network).cpu().eval()
    if logits is not None:
        vars(copied)[EXPORT_LOGITS] = logits
    return copied


def check_module(where: str, module: nn.Module) -> None:
    """Raise `LoweringError` if *module* cannot be captured, `CertificateError` if a method was replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        raise LoweringError(
            f"{where} is a ScriptModule; export the module that it was scripted or traced from"
        )
    if isinstance(module, LazyModuleMixin):
        raise LoweringError(f"{where} is not initialized; run the network once before the export")
    if isinstance(module, OptimizedModule):
        raise LoweringError(f"{where} is compiled; put its _orig_mod in its place")
    if vars(module).get("_compiled_call_impl") is not None:
        check_backend(where, vars(module)["_compiled_call_impl"])
    for attribute, value in vars(module).items():
        if callable(value) and callable(getattr(type(module), attribute, None)):
            raise CertificateError(
                f"{attribute} of {where} was replaced on the instance; put the change into a class"
            )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise `LoweringError` unless *tensor* has finite values in float32, or integers."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    inexact = tensor.is_floating_point() or tensor.is_complex()
    if not dense or (inexact and tensor.dtype != torch.float32):
        kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise LoweringError(
            f"{name} is a {kind}; the exporter accepts dense tensors of float32 or integers: convert it, "
            "for example with .float(), and choose the precision of the export"
        )
    if inexact and not bool(torch.isfinite(tensor).all()):
        raise LoweringError(f"{name} holds NaN or infinite values; train again or use an earlier checkpoint")


def check_outputs(
    deployed: Deployed, preprocess: Preprocess, classes: int, role: str
) -> tuple[str | None, tuple[str, ...]]:
    """Run the network on probe images, alone and together, and check shape, finiteness and state.

    Returns the path of a cache that the first runs fill, or None, and warnings. Raises `LoweringError` if
    the network fails, returns no (B, classes) logits or changes its state, or if the logits of an image
    depend on other images or on earlier runs.
    """
    images, network = torch.from_numpy(probe_images(preprocess)[-IMAGES:]), deployed.network
    new = read_state(network)
    first, _ = (run(deployed, images[:size], role, classes) for size in (IMAGES, 1))
    before = read_state(network)
    with InPlaceWrites(network) as writes, PythonReads() as reads:
        run(deployed, images[:1], role, classes)
    logits = run(deployed, images, role, classes)
    written = first_change(before, read_state(network)) or next(iter(writes.found), None)
    if written is not None:
        raise LoweringError(f"{written} changes while the {role} network runs; {STATELESS}")
    if reads.found is not None:
        raise LoweringError(f"Python code of the {role} network reads tensors ({reads.found}); {NO_GRAPH}")
    check_finite(logits, role)
    if not torch.equal(first, logits):
        raise LoweringError(f"the {role} network returns other logits in a second run, as random numbers do")
    exact = copy_module(deployed).double()  # without rounding, which would hide small influences
    with InFloat64():
        alone, together = (run(exact, images[:size], role, classes, " in float64") for size in (1, IMAGES))
    if not bool(((alone - together[:1]).abs() <= ALONE_TOLERANCE * together.abs().max()).all()):
        raise LoweringError(f"the {role} network returns other logits for an image alone than in a batch")
    is_softmax = (logits >= 0).all() & ((logits.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all()
    found = {SAME_LOGITS: torch.equal(logits, logits[:1].expand_as(logits)), SOFTMAX: bool(is_softmax)}
    warnings = tuple(f"the {role} network {text}" for text, holds in found.items() if holds)
    return first_change(new, before), warnings


def check_finite(logits: Tensor, role: str) -> None:
    """Raise `LoweringError` if *logits* of probe images are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise LoweringError(
            f"the {role} network returns NaN or infinite logits for a probe image; the probes include "
            "images of one color, so add a small constant wherever it divides, such as by a norm"
        )


def run(deployed: nn.Module, images: Tensor, role: str, classes: int, where: str = "") -> Tensor:
    """Compute the logits (B, classes) of *images*; all errors of the user's code become `LoweringError`."""
    size = len(images)
    try:
        with torch.no_grad():
            logits: Tensor = deployed(images)[0]
    except LoweringError:
        raise
    except Exception as error:  # the user's code
        raise LoweringError(
            f"the {role} network fails for {size} images{where}: {first_line(error)}"
        ) from error
    if type(logits) is not Tensor or tuple(logits.shape) != (size, classes):
        raise LoweringError(
            f"the {role} network returns {tuple(logits.shape)} for {size} images, not ({size}, {classes}): "
            "one row per image, also for a single one, and one logit per label"
        )
    return logits
