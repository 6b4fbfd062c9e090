"""`sopdeploy engine --dry-run`: plan a build without a GPU and without TensorRT."""

from collections.abc import Sequence
from math import prod

import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError, RuntimeUnavailableError
from sopdeploy.tensorrt.binding import import_tensorrt, parse_version
from sopdeploy.tensorrt.cuda import open_cuda
from sopdeploy.tensorrt.profiles import Profile, parse_profiles
from sopdeploy.tensorrt.record import Hazard
from sopdeploy.tensorrt.session import BUFFERS
from sopdeploy_export.tensorrt.engine import EngineOptions, make_key
from sopdeploy_export.tensorrt.lint import check_precision, lint
from sopdeploy_export.tensorrt.rewrites import constants

SUPPORTED = ("8.6.1", "10.0.1", "10.16.0", "11.0.0", "11.1.0")
ITEM_BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.DOUBLE: 8,
}


class ProfileMemory(StrictModel):
    """Bytes of one profile at its largest batch; `borders` are its inputs and outputs."""

    batch: int
    activations: int
    borders: int


class MemoryEstimate(StrictModel):
    """Bytes of an engine: the weights, and the activations of each profile.

    The profiles share the block of the largest one. (TensorRT before 10.1 cannot share it and needs the sum.)
    """

    weights: int
    profiles: tuple[ProfileMemory, ...]

    @property
    def total(self) -> int:
        """GPU memory of a process that serves all profiles, without workspace and the CUDA context."""
        borders = max(profile.borders for profile in self.profiles)
        activations = max(profile.activations for profile in self.profiles)
        return self.weights + BUFFERS * borders + activations


class LintResult(StrictModel):
    """The lint for one TensorRT version: its rewrites, or why it rejects the graph."""

    tensorrt: str
    hazards: tuple[Hazard, ...]
    refused: str | None


class EnginePlan(StrictModel):
    """The plan of a build; `key_unknown` says why there is no `key`."""

    bundle: str
    precision: str
    profiles: tuple[Profile, ...]
    memory: MemoryEstimate
    lint: tuple[LintResult, ...]
    key: str | None
    key_unknown: str | None


def estimate(model: onnx.ModelProto, profiles: Sequence[Profile]) -> MemoryEstimate:
    """Estimate the memory of an engine of *model*, from the lifetimes of its values."""
    weights = sum(prod(t.dims) * ITEM_BYTES.get(t.data_type, 1) for t in constants(model).values())
    found = []
    for batch in (profile.maximum for profile in profiles):
        sizes = _value_bytes(model, batch)
        borders = [value.name for value in (*model.graph.input, *model.graph.output)]
        last_use = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
        alive, peak = 0, 0
        for index, node in enumerate(model.graph.node):
            alive += sum(sizes.get(name, 0) for name in node.output if name not in borders)
            peak = max(peak, alive)
            finished = {name for name in (*node.input, *node.output) if last_use.get(name, index) == index}
            alive -= sum(sizes.get(name, 0) for name in finished if name not in borders)
        total = sum(sizes.get(name, 0) for name in borders)
        found.append(ProfileMemory(batch=batch, activations=peak, borders=total))
    return MemoryEstimate(weights=weights, profiles=tuple(found))


def _value_bytes(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    weights = constants(model)
    found = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        if value.name not in weights:
            sizes = [dim.dim_value or 1 for dim in tensor.shape.dim]
            found[value.name] = prod(sizes) * ITEM_BYTES.get(tensor.elem_type, 1)
    return found


def plan_engine(bundle: Bundle, options: EngineOptions) -> EnginePlan:
    """Plan the build of *bundle*, for the installed TensorRT or for every supported version.

    Raises `EngineError` if the requested precision is not the graph's, `LoweringError` if every planned
    version rejects the graph.
    """
    profiles = parse_profiles(options.profiles, bundle.manifest.batch)
    try:
        tensorrt: str | None = str(import_tensorrt().__version__)
    except RuntimeUnavailableError:
        tensorrt = None
    key, reason = None, "TensorRT is not installed"
    try:
        gpu = open_cuda().gpu()
        key = make_key(bundle, options, profiles, tensorrt, gpu).name if tensorrt else None
    except RuntimeUnavailableError as problem:
        reason = str(problem) if tensorrt else reason
    precision = options.precision or bundle.manifest.precision
    model = onnx.load(bundle.onnx)
    check_precision(model, precision, parse_version(tensorrt) if tensorrt else None)
    results = tuple(
        _lint_for(model, version, profiles) for version in ([tensorrt] if tensorrt else SUPPORTED)
    )
    if all(result.refused for result in results):
        raise LoweringError(str(results[-1].refused))
    return EnginePlan(
        bundle=bundle.name,
        precision=precision,
        profiles=profiles,
        memory=estimate(model, profiles),
        lint=results,
        key=key,
        key_unknown=None if key else reason,
    )


def _lint_for(model: onnx.ModelProto, tensorrt: str, profiles: Sequence[Profile]) -> LintResult:
    try:
        _, hazards = lint(model, parse_version(tensorrt), profiles)
    except LoweringError as problem:
        return LintResult(tensorrt=tensorrt, hazards=(), refused=str(problem))
    return LintResult(tensorrt=tensorrt, hazards=hazards, refused=None)
