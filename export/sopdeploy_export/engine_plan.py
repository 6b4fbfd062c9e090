"""`sopdeploy engine --dry-run`: everything about an engine that needs no GPU and no TensorRT."""

from collections.abc import Sequence

import onnx

from sopdeploy.bundle import Bundle
from sopdeploy.engines.binding import import_tensorrt, parse_version
from sopdeploy.engines.cuda import Gpu, open_cuda
from sopdeploy.engines.profiles import Profile, parse_profiles
from sopdeploy.engines.record import Hazard
from sopdeploy.errors import LoweringError, RuntimeUnavailableError
from sopdeploy.frozen import Frozen
from sopdeploy_export.engine_estimate import MemoryEstimate, estimate
from sopdeploy_export.engine_lint import lint, refuse_another_precision
from sopdeploy_export.engine_tensorrt import EngineOptions, make_key

SUPPORTED = ("8.6.1", "10.0.1", "10.16.0", "11.0.0", "11.1.0")


class LintResult(Frozen):
    """What the lint says for one TensorRT: what it rewrites, or why it refuses."""

    tensorrt: str
    hazards: tuple[Hazard, ...]
    refused: str | None


class EnginePlan(Frozen):
    """What a build would do: profiles, memory, lint by TensorRT, the key where the machine is known."""

    bundle: str
    precision: str
    profiles: tuple[Profile, ...]
    memory: MemoryEstimate
    lint: tuple[LintResult, ...]
    key: str | None
    key_unknown: str | None  # why there is no key


def plan_engine(bundle: Bundle, options: EngineOptions) -> EnginePlan:
    """Return what `engine` would do with *bundle*, for the installed TensorRT or for all that are supported.

    Raises `EngineError` where the precision is not the graph's, `LoweringError` where the installed TensorRT
    would refuse the graph.
    """
    profiles = parse_profiles(options.profiles, bundle.manifest.batch)
    model = onnx.load(bundle.onnx)
    installed = installed_tensorrt()
    precision = options.precision or bundle.manifest.precision
    refuse_another_precision(model, precision, parse_version(installed) if installed else None)
    results = tuple(
        lint_for(model, version, profiles) for version in ([installed] if installed else SUPPORTED)
    )
    if all(result.refused for result in results):
        raise LoweringError(str(results[-1].refused))
    gpu, why = visible_gpu()
    unknown = why if installed else "TensorRT is not installed"
    key = make_key(bundle, options, profiles, installed, gpu).name if installed and gpu else None
    return EnginePlan(
        bundle=bundle.name,
        precision=precision,
        profiles=profiles,
        memory=estimate(model, profiles),
        lint=results,
        key=key,
        key_unknown=None if key else unknown,
    )


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
