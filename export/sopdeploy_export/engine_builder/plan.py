"""`sopdeploy engine --dry-run`: plan a build without a GPU and without TensorRT."""

import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError, RuntimeUnavailableError
from sopdeploy.tensorrt.binding import import_tensorrt, parse_version
from sopdeploy.tensorrt.cache import Hazard, Profile
from sopdeploy.tensorrt.cuda import open_cuda
from sopdeploy_export.engine_builder.engine import engine_key, requested_profiles
from sopdeploy_export.engine_builder.lint import lint
from sopdeploy_export.engine_builder.options import EngineOptions

SUPPORTED = ("10.13.0", "10.16.0", "11.0.0")


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
    lint: tuple[LintResult, ...]
    key: str | None
    key_unknown: str | None


def plan_engine(bundle: Bundle, options: EngineOptions) -> EnginePlan:
    """Plan the build of *bundle*, for the installed TensorRT or for every supported version.

    Raises `LoweringError` if every planned version rejects the graph.
    """
    profiles = requested_profiles(bundle, options)
    installed = key = reason = None
    try:
        installed = str(import_tensorrt().__version__)
        key = engine_key(bundle, options, profiles, installed, open_cuda().gpu()).name
    except RuntimeUnavailableError as error:
        reason = str(error)
    model, results = onnx.load(bundle.onnx), []
    for tensorrt in [installed] if installed else SUPPORTED:
        hazards: tuple[Hazard, ...] = ()
        refused = None
        try:
            _, hazards = lint(model, parse_version(tensorrt), profiles)
        except LoweringError as error:
            refused = str(error)
        results.append(LintResult(tensorrt=tensorrt, hazards=hazards, refused=refused))
    if all(result.refused for result in results):
        raise LoweringError(str(results[-1].refused))
    return EnginePlan(
        bundle=bundle.name,
        precision=bundle.manifest.precision,
        profiles=profiles,
        lint=tuple(results),
        key=key,
        key_unknown=reason,
    )
