"""Checks of a user's network before anything is proved: its modules, its tensors, its outputs and its graph.

The network that the user gave is captured, not a copy, because its classes can define how they are copied.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule  # what torch.compile returns
from torch._subclasses import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sopdeploy.errors import CertificateError, LoweringError, SopdeployError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy.models.base import is_in
from sopdeploy_export import state
from sopdeploy_export.admit.state import check_hooks
from sopdeploy_export.capture.deployed import EXPORT_LOGITS, Deployed, compute_outputs, generated_images
from sopdeploy_export.capture.program import Captured, capture, capture_any_batch
from sopdeploy_export.network import copy_module, modules, tensors, unstored_buffers
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.program_hashes import VALUE_LAYOUT, operator_name, value_root
from sopdeploy_export.prove.tensors import check_graph_ignores, randomized

WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_IMAGES = 4  # probes that are computed eagerly
SUM_TOLERANCE = 1e-3  # of probabilities
MAX_CONSTANT = 16  # numbers of a tensor that is no parameter or buffer, such as a mean and a deviation
LAYOUT_TOLERANCE = 1e-4  # of the largest logit, because rounding depends on the layout of weights
GPU_TOLERANCE = 1e-2  # of the largest logit, because a GPU may use TF32
# What torch says of `cond`, `while_loop`, `scan` and `map`.
CONTROL_FLOW = re.compile(r"(?:HOP|HigherOrderOperator) (\w+) and mode")
# Operators whose result has values of their first operand.
KEEP_VALUES = {
    *VALUE_LAYOUT, "aten._to_copy", "aten.permute", "aten.transpose", "aten.expand", "aten.slice",
    "aten.select", "aten.dropout",
}  # fmt: skip
OTHER_COPY = (
    "a copy of the network with contiguous weights computes something else than the network: its code must "
    "not depend on the memory layout, and its classes must not define how they are copied"
)


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

    with state.recording_calls(record) if replaced else nullcontext():
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


def check_outputs(
    deployed: Deployed, preprocess: Preprocess, classes: int, role: str
) -> tuple[str | None, tuple[str, ...]]:
    """Run the network twice on four probe images and twice on one; check shape, finiteness and state.

    Returns the path of the first attribute that the first two runs change, such as a cache, or None if they
    change none; and warnings. Raises the errors of `check_finite`, and `LoweringError` if the network fails,
    returns no (B, classes) logits, returns probabilities or reads tensors in Python code, or if the last two
    runs change its state or return other logits.
    """
    images, network = torch.from_numpy(generated_images(preprocess.crop)[-_IMAGES:]), deployed.network
    before = state.read_state(network)
    first_logits = _run(deployed, images, role, classes)
    _run(deployed, images[:1], role, classes)
    after_first = state.read_state(network)
    # Writes and reads are recorded for one image only: four images cause the same.
    with state.InPlaceWrites(network) as writes, state.PythonReads() as reads:
        _run(deployed, images[:1], role, classes)
    logits = _run(deployed, images, role, classes)
    # A write through `tensor.data` changes no version, so `first_change` misses it and `writes` has it.
    changed = state.first_change(after_first, state.read_state(network)) or next(iter(writes.written), None)
    if changed is not None:
        raise LoweringError(f"{changed} changes while the {role} network runs; {state.NOT_IN_EVAL}")
    if reads.first is not None:
        raise LoweringError(
            f"Python code of the {role} network reads tensors ({reads.first}); a graph has one path for all "
            "images and layouts, as with torch.where"
        )
    check_finite(logits, role)
    if not torch.equal(first_logits, logits):
        raise LoweringError(f"the {role} network returns other logits in a second run, as random numbers do")
    warnings = []
    if torch.equal(logits, logits[:1].expand_as(logits)):
        warnings.append(f"the {role} network returns the same logits for every probe image; is it trained?")
    if bool((logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all()):
        raise LoweringError(
            f"the {role} network returns probabilities, to which the service would apply a softmax; return "
            "the logits before its softmax, or the logarithms of the probabilities"
        )
    return state.first_change(before, after_first), tuple(warnings)


def check_finite(logits: Tensor, role: str) -> None:
    """Raise `LoweringError`, or `CertificateError` for the detached network, unless *logits* are finite."""
    if not bool(torch.isfinite(logits).all()):
        if role == "detached":  # those of the trained network were finite, so a stub's NaN is in these
            raise CertificateError(
                "the output depends on a removed part: without its values, the logits are NaN or infinite; "
                "keep this part",
                setting="training_only",
            )
        raise LoweringError(
            f"the {role} network returns NaN or infinite logits for a probe image; the probes include "
            "images of one color, so add a small constant wherever it divides, such as by a norm"
        )


def _run(deployed: nn.Module, images: Tensor, role: str, classes: int) -> Tensor:
    """Compute the logits (B, classes) of *images*; all errors of the user's code become `LoweringError`."""
    size = len(images)
    try:
        with torch.no_grad():
            logits: Tensor = deployed(images)[0]
    except SopdeployError:
        raise
    except Exception as error:  # the user's code
        if operation := CONTROL_FLOW.search(str(error)):
            raise LoweringError(
                f"the {role} network uses torch.{operation[1]}; a graph has no control flow: compute all "
                "branches, and choose with torch.where"
            ) from error
        raise LoweringError(f"the {role} network fails for {size} images: {first_line(error)}") from error
    if type(logits) is not Tensor or tuple(logits.shape) != (size, classes):
        raise LoweringError(
            f"the {role} network returns {tuple(logits.shape)} for {size} images, not ({size}, {classes}): "
            "one row per image, also for a single one, and one logit per label"
        )
    return logits


def create_buffers(network: nn.Module, preprocess: Preprocess) -> tuple[str, ...]:
    """Give *network* the buffers that its first run creates or replaces; return their names.

    These are buffers that the state dict does not store, such as a table of positions for the size of the
    images. They are those of a run on images without values, so a buffer that depends on the images is not
    among them.
    """
    images = torch.zeros(2, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    device = next((tensor.device for tensor in tensors(network).values()), images.device)
    pixels = Normalize(preprocess, images_format(network))(images).to(device)
    before = unstored_buffers(network)
    if not _changed_buffers(network, pixels, before):
        return ()
    # Only now, because a run without values can leave such tensors in objects that are not restored.
    unknown = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(pixels)
    created = _changed_buffers(network, unknown, before)
    owners = dict(modules(network))
    for name, tensor in created.items():
        owner, _, key = name.rpartition(".")
        owners[owner].register_buffer(key, tensor, persistent=False)
    return tuple(created)


def _changed_buffers(
    network: nn.Module, pixels: Tensor, before: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Map the names of unstored buffers that a run on *pixels* creates or replaces to their tensors.

    Tensors without values are left out. *network* is unchanged afterwards.
    """
    with state.preserved(network), torch.no_grad():
        with suppress(Exception):  # of the user's code; a later run gives the message
            compute_outputs(network, pixels)
        after = unstored_buffers(network)
    return {
        name: tensor
        for name, tensor in after.items()
        if type(tensor) is Tensor and tensor is not before.get(name)
    }


def turn_into_attributes(network: nn.Module, names: Sequence[str]) -> None:
    """Turn the buffers *names* of *network* into attributes, which a run may assign, as caches."""
    owners = dict(modules(network))
    for name in names:
        owner, _, key = name.rpartition(".")
        if key in owners[owner]._buffers:  # it may not exist before the first run
            tensor = owners[owner]._buffers[key]
            delattr(owners[owner], key)
            vars(owners[owner])[key] = tensor


@contextmanager
def prepared_in_place(given: nn.Module, logits: str | int | None, preprocess: Preprocess) -> Iterator[None]:
    """Prepare *given*, the user's network, for the block: eval mode, uncompiled, *logits* named, buffers.

    At the end, its attributes are as before.
    """
    with state.preserved(given):
        given.eval()
        for _, module in modules(given):
            vars(module)["_compiled_call_impl"] = None
        if logits is not None:
            vars(given)[EXPORT_LOGITS] = logits  # not by `setattr`, which a class can define
        create_buffers(given, preprocess)
        yield


def capture_and_compare(
    given: nn.Module,
    copied: nn.Module,
    preprocess: Preprocess,
    classes: int,
    options: ExportOptions,
    parts: Sequence[str],
) -> Captured:
    """Capture *given*, the user's network, or *copied*, which is exported; check that they compute the same.

    They can differ because a class can define how it is copied. Both networks run on probe images. Unless
    *given* is on a GPU, their graphs are compared, too: here, or by `certify` if the result is the graph of
    *given*. A graph must stay the same while the removed *parts* have random values. Raises `LoweringError`
    if the networks differ, and `CertificateError` if the graph depends on the *parts*.
    """
    stored = list(tensors(given).values())
    devices = {tensor.device for tensor in stored} or {torch.device("cpu")}
    device = next(iter(devices))  # of the images; the network itself moves values between several
    on_cpu = devices == {torch.device("cpu")}
    is_exact = on_cpu and all(tensor.is_contiguous() for tensor in stored)  # stored as in *copied*
    tolerance = LAYOUT_TOLERANCE if on_cpu else GPU_TOLERANCE
    images = torch.from_numpy(generated_images(preprocess.crop))
    deployed = Deployed(given, preprocess).eval()
    deployed.normalise.to(device)
    for batch in (images, images[:1]):
        # Caches are empty again when the networks are captured.
        with state.preserved(given), state.preserved(copied), refusing_replaced_methods(given):
            expected = _run(deployed, batch.to(device), "given", classes).cpu()
            logits = _run(Deployed(copied, preprocess).eval(), batch, "trained", classes)
        check_finite(expected, "given")
        allowed = 0.0 if is_exact else tolerance * expected.abs().max()
        if not bool(((logits - expected).abs() <= allowed).all()):
            raise LoweringError(OTHER_COPY)
    # `certify` compares the programs of *given* as those of "trained", unless features change the network.
    if is_exact and not options.with_features:
        captured = capture(given, preprocess, options.batch)
        if parts:
            check_graph_ignores(given, parts, preprocess, options.batch, captured)
        return captured
    captured = capture(copied, preprocess, options.batch)
    if on_cpu:
        with randomized(given, parts):
            program = capture_any_batch(given, preprocess, options.batch)
        if value_root(program).sha256 != value_root(captured.any_batch).sha256:  # these ignore the layout
            raise LoweringError(OTHER_COPY)
    elif parts:  # the graph of *given* names the GPU, so it cannot be compared
        check_graph_ignores(copied, parts, preprocess, options.batch, captured)
    return captured


def check_constants(captured: Captured, network: nn.Module) -> None:
    """Raise `LoweringError` if a graph contains a large tensor that *network* has not registered."""
    registered = {tensor.untyped_storage().data_ptr() for tensor in tensors(network).values()}
    for program in (captured.any_batch, captured.batch_of_one):
        users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            constant = program.constants.get(spec.target or "")
            if spec.kind != InputKind.CONSTANT_TENSOR or not isinstance(constant, Tensor):
                continue
            if constant.numel() <= MAX_CONSTANT or not users[spec.arg.name]:
                continue
            if constant.untyped_storage().data_ptr() not in registered:  # nor is it a view of such a tensor
                held = state.held_tensors(network).items()
                equal_paths = (path for path, tensor in held if tensor.equal(constant))
                name = next(equal_paths, f"a tensor of shape {tuple(constant.shape)}")
                raise LoweringError(
                    f"the output depends on {name}, which is no parameter or buffer, so no weight file "
                    "contains it; use ModuleList, ModuleDict or register_buffer",
                    remedies={"plain": None, "allow_constants": True},
                )


def check_ends_in_logits(captured: Captured) -> None:
    """Raise `LoweringError` if the logits of a program are the results of a sigmoid."""
    aten = torch.ops.aten
    for program in (captured.any_batch, captured.batch_of_one):
        node, *_ = program.graph.output_node().args[0]  # the logits are the first output
        while operator_name(node) in KEEP_VALUES:
            node = node.args[0]
        if node.target in (aten.sigmoid.default, aten.hardsigmoid.default, aten.special_expit.default):
            raise LoweringError(
                "the trained network ends in a sigmoid, and the service applies a softmax or a sigmoid "
                "itself; return the logits before it and, if an image may have several classes,",
                remedies={"several_classes": True},
            )


def check_unchanged_by_run(path: str, captured: Captured, filled: Captured) -> None:
    """Check that a network computes the same after its first run, which changed the attribute at *path*.

    *filled* are the programs after that run. Raises `LoweringError`.
    """
    pairs = ((captured.any_batch, filled.any_batch), (captured.batch_of_one, filled.batch_of_one))
    if any(value_root(before).sha256 != value_root(after).sha256 for before, after in pairs):
        raise LoweringError(
            f"{path} changes while the trained network runs, which computes something else afterwards; "
            f"{state.STATELESS}"
        )
