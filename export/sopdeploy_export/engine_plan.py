"""`sopdeploy engine --dry-run`: everything about an engine that needs no GPU and no TensorRT."""

from collections.abc import Sequence
from typing import Any

import onnx

from sopdeploy.bundle import Bundle
from sopdeploy.engines.binding import import_tensorrt, parse_version
from sopdeploy.engines.cuda import Gpu, open_cuda
from sopdeploy.engines.profiles import Profile
from sopdeploy.engines.record import Hazard, Via
from sopdeploy.errors import LoweringError, RuntimeUnavailableError
from sopdeploy.extras import how_to_get
from sopdeploy.frozen import Frozen
from sopdeploy.machine import installed
from sopdeploy_export.engine_estimate import MemoryEstimate, estimate
from sopdeploy_export.engine_lint import lint, refuse_another_precision
from sopdeploy_export.engine_tensorrt import EngineOptions, make_key, profiles_of
from sopdeploy_export.engine_torch import PACKAGE, PROGRAM, SOURCE

SUPPORTED = ("8.6.1", "10.0.1", "10.16.0", "11.0.0", "11.1.0")


class LintResult(Frozen):
    """What the lint says for one TensorRT: what it rewrites, or why it refuses."""

    tensorrt: str
    hazards: tuple[Hazard, ...]
    refused: str | None


class ProgramFound(Frozen):
    """The program that torch-tensorrt would build, whose hash was checked, and what is `installed` for it.

    `missing` says how to get torch-tensorrt where it is not.
    """

    file: str
    bytes: int
    sha256: str
    installed: dict[str, str]
    missing: str | None


class EnginePlan(Frozen):
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
    missing = None if PACKAGE in found else how_to_get(PACKAGE, SOURCE)
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
