"""`sopdeploy engine --dry-run`: everything about an engine that needs no GPU and no TensorRT."""

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.config import StrictModel
from sopdeploy.environment import install_hint, installed
from sopdeploy.errors import LoweringError, RuntimeUnavailableError
from sopdeploy.tensorrt.binding import import_tensorrt, parse_version
from sopdeploy.tensorrt.cuda import Gpu, open_cuda
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.tensorrt.record import Hazard, Via
from sopdeploy_export.tensorrt.engine import EngineOptions, make_key, profiles_of
from sopdeploy_export.tensorrt.lint import lint, refuse_another_precision
from sopdeploy_export.tensorrt.rewrites import constants
from sopdeploy_export.tensorrt.torch_tensorrt import PACKAGE, PROGRAM, SOURCE

BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.DOUBLE: 8,
}


class ProfileMemory(StrictModel):
    """Bytes that one profile needs at its largest batch."""

    batch: int
    activations: int
    borders: int


class MemoryEstimate(StrictModel):
    """Bytes of weights, once, and of each profile; every profile's context holds its own activations."""

    weights: int
    profiles: tuple[ProfileMemory, ...]

    @property
    def total(self) -> int:
        """Return the bytes of a process that serves all profiles, workspace not counted."""
        borders = max(profile.borders for profile in self.profiles)
        return self.weights + borders + sum(profile.activations for profile in self.profiles)


def estimate(model: onnx.ModelProto, profiles: Sequence[Profile]) -> MemoryEstimate:
    """Return the memory that an engine of *model* with *profiles* will need, about."""
    weights = sum(prod(tensor.dims) * BYTES.get(tensor.data_type, 1) for tensor in constants(model).values())
    return MemoryEstimate(
        weights=weights,
        profiles=tuple(profile_memory(model, profile.maximum) for profile in profiles),
    )


def profile_memory(model: onnx.ModelProto, batch: int) -> ProfileMemory:
    """Return what *model* needs for *batch* images at once."""
    sizes = value_sizes(model, batch)
    border = [value.name for value in (*model.graph.input, *model.graph.output)]
    last_use = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive, peak = 0, 0
    for index, node in enumerate(model.graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output if name not in border)
        peak = max(peak, alive)
        finished = {name for name in (*node.input, *node.output) if last_use.get(name, index) == index}
        alive -= sum(sizes.get(name, 0) for name in finished if name not in border)
    return ProfileMemory(batch=batch, activations=peak, borders=sum(sizes.get(name, 0) for name in border))


def value_sizes(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    """Return the bytes of every computed value of *model* for *batch* images."""
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for value in fixed.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in fixed.graph.output:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    weights = constants(model)
    found = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        sizes = [dim.dim_value or 1 for dim in tensor.shape.dim]
        if value.name not in weights:
            found[value.name] = prod(sizes) * BYTES.get(tensor.elem_type, 1)
    return found


SUPPORTED = ("8.6.1", "10.0.1", "10.16.0", "11.0.0", "11.1.0")


class LintResult(StrictModel):
    """What the lint says for one TensorRT: what it rewrites, or why it refuses."""

    tensorrt: str
    hazards: tuple[Hazard, ...]
    refused: str | None


class ProgramFound(StrictModel):
    """The program that torch-tensorrt would build, whose hash was checked, and what is `installed` for it.

    `missing` says how to get torch-tensorrt where it is not.
    """

    file: str
    bytes: int
    sha256: str
    installed: dict[str, str]
    missing: str | None


class EnginePlan(StrictModel):
    """What a build would do: way, profiles, the key where the machine is known.

    By ONNX also the memory and the lint by TensorRT; by torch-tensorrt the `program`, since what becomes of
    that is known only when it is built.
    """

    bundle: str
    via: Via
    precision: str
    profiles: tuple[Profile, ...]
    memory: MemoryEstimate | None = None
    lint: tuple[LintResult, ...] = ()
    program: ProgramFound | None = None
    key: str | None
    key_unknown: str | None  # why there is no key


def plan_engine(bundle: Bundle, options: EngineOptions) -> EnginePlan:
    """Return what `engine` would do with *bundle*, for the installed TensorRT or for all that are supported.

    Raises `EngineError` where the precision is not the graph's, `LoweringError` where the installed TensorRT
    would refuse the graph.
    """
    profiles = profiles_of(bundle, options)
    tensorrt = installed_tensorrt()
    gpu, why = visible_gpu()
    unknown = why if tensorrt else "TensorRT is not installed"
    key = make_key(bundle, options, profiles, tensorrt, gpu).name if tensorrt and gpu else None
    plan = EnginePlan(
        bundle=bundle.name,
        via=options.via,
        precision=options.precision or bundle.manifest.precision,
        profiles=profiles,
        key=key,
        key_unknown=None if key else unknown,
    )
    return plan.model_copy(
        update={"program": program_found(bundle)}
        if options.via == "torch-tensorrt"
        else seen_in_graph(bundle, plan, tensorrt)
    )


def program_found(bundle: Bundle) -> ProgramFound:
    """Return what torch-tensorrt would be given of *bundle*; neither it nor torch is imported."""
    record = bundle.manifest.files[PROGRAM]
    found = installed(("torch", PACKAGE))
    missing = None if PACKAGE in found else install_hint(PACKAGE, SOURCE)
    return ProgramFound(
        file=PROGRAM, bytes=record.bytes, sha256=record.sha256, installed=found, missing=missing
    )


def seen_in_graph(bundle: Bundle, plan: EnginePlan, tensorrt: str | None) -> dict[str, Any]:
    """Return the memory that *plan* would take and what the lint says of the graph."""
    model = onnx.load(bundle.onnx)
    refuse_another_precision(model, plan.precision, parse_version(tensorrt) if tensorrt else None)
    results = tuple(
        lint_for(model, version, plan.profiles) for version in ([tensorrt] if tensorrt else SUPPORTED)
    )
    if all(result.refused for result in results):
        raise LoweringError(str(results[-1].refused))
    return {"memory": estimate(model, plan.profiles), "lint": results}


def lint_for(model: onnx.ModelProto, tensorrt: str, profiles: Sequence[Profile]) -> LintResult:
    """Return what the lint says of *model* for the release *tensorrt*."""
    try:
        _, hazards = lint(model, parse_version(tensorrt), profiles)
    except LoweringError as problem:
        return LintResult(tensorrt=tensorrt, hazards=(), refused=str(problem))
    return LintResult(tensorrt=tensorrt, hazards=hazards, refused=None)


def installed_tensorrt() -> str | None:
    """Return the version of the installed TensorRT, if there is one."""
    try:
        return str(import_tensorrt().__version__)
    except RuntimeUnavailableError:
        return None


def visible_gpu() -> tuple[Gpu | None, str | None]:
    """Return the GPU, or why there is none."""
    try:
        return open_cuda().gpu(), None
    except RuntimeUnavailableError as problem:
        return None, str(problem)
