"""Build or find the TensorRT engine of a bundle for this machine; without torch.

An engine is kept only if it reproduces the bundle's probes.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.onnx_root import weights_beside
from sopdeploy.bundle.probes import Replay, check_replays, read_probes, replay_in_turn
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy_commands.engine_builder.build import (
    Report,
    cast_images_first,
    parse_and_build,
)
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.runtime import tensorrt_cache as cache
from sopdeploy_service.runtime.tensorrt_cache import EngineKey
from sopdeploy_service.runtime.tensorrt_session import (
    Cuda,
    EngineSession,
    import_tensorrt,
    open_cuda,
)

# Builds a plan for the batches of a profile, in a workspace of a number of bytes.
BuildViaTorch: TypeAlias = Callable[[cache.Profile, int], bytes]


@dataclass(frozen=True)
class EngineFile:
    """A plan in the cache and its record; `reason` says why it was built, or is None if it was cached."""

    path: Path
    record: cache.EngineRecord
    reason: str | None


def get_engine(
    bundle: Bundle,
    options: EngineOptions,
    report: Report = lambda _: None,
    build_via_torch: BuildViaTorch | None = None,
) -> EngineFile:
    """Find the engine of *bundle* for this machine in the cache, or build it; replay the probes on it.

    *report* receives the progress. *build_via_torch* builds the plan instead of TensorRT's
    parser; it is given if, and only if, *options* name torch-tensorrt. Raises
    `RuntimeUnavailableError` without TensorRT or a GPU, `LoweringError` or `EngineError` if no
    engine can be built, and `ParityError` if the outputs of a new one deviate from the probes
    and *options* do not allow it.
    """
    is_via_torch = options.via == "torch-tensorrt"
    if is_via_torch != (build_via_torch is not None):
        raise ValueError(f"build_via_torch does not fit via={options.via}")

    # TensorRT cannot read a graph that is quantized for CPUs: it takes uint8 for int8, and
    # rejects zero points.
    if bundle.manifest.int8_for == "cpu":
        raise LoweringError(
            f"{bundle.path}: is quantized for CPUs, but TensorRT needs int8 with zero point 0: export again "
            "with --precision int8 --set int8_for=tensorrt"
        )

    profiles = cache.parse_profiles(options.profiles, bundle.manifest.batch)
    if is_via_torch:  # torch-tensorrt builds plans with one profile
        profiles = (cache.Profile(minimum=profiles[0].minimum, maximum=profiles[-1].maximum),)

    # The key names all on which a plan depends: graph, profiles, converter, TensorRT and the GPU.
    trt = import_tensorrt()
    cuda = open_cuda()
    gpu = cuda.gpu()
    fields = cache.key_fields(bundle, str(trt.__version__), gpu)
    key = EngineKey.model_validate({**fields, "profiles": profiles, "via": options.via})

    folder = cache.cache_folder(bundle, options.cache)
    cached = cache.load_engine(folder, dict(key))

    # A cached engine must pass the probes again, or it is rebuilt; `reason` says why.
    if isinstance(cached, cache.StoredEngine):
        report("checking the reference outputs on the cached engine")
        try:
            errors = cached.record.accepted_errors
            check_replays(replay_probes(trt, cuda, bundle, cached.plan, key, errors))
            return EngineFile(
                path=folder / f"{key.name}.plan", record=cached.record, reason=None
            )
        except ParityError as error:
            reason = f"the cached engine is wrong: {error}"
    else:
        reason = cached  # why there is none

    # Build the plan: from the ONNX graph or, by torch-tensorrt, from the program of the checkpoint.
    report(f"building: {reason}")
    begin = time.monotonic()
    workspace = gpu.memory // 4
    if build_via_torch is None:
        model = cast_images_first(onnx.load_model_from_string(bundle.onnx.read()))
        graph = model.SerializeToString(deterministic=True)
        weights = weights_beside(bundle, model.graph)
        plan = parse_and_build(trt, graph, profiles, workspace, report, weights)
    else:
        plan = build_via_torch(profiles[0], workspace)  # without progress
    seconds = round(time.monotonic() - begin, 3)

    # Only an engine that passes the probes gets into the cache, or one whose error is allowed.
    report("checking outputs")
    replays = replay_probes(trt, cuda, bundle, plan, key)
    accepted_errors = _accept_errors(replays, is_allowed=options.allow_numerical_error)

    record = cache.EngineRecord(
        key=key,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        build_seconds=seconds,
        replays=replays,
        accepted_errors=accepted_errors,
    )

    return EngineFile(
        path=cache.store_engine(folder, plan, record), record=record, reason=reason
    )


def _accept_errors(replays: tuple[Replay, ...], *, is_allowed: bool) -> dict[str, float]:
    """Return the limits of the outputs whose error exceeds their tolerance; raise `ParityError` unless *is_allowed*.

    The server runs other batch sizes, too, so a limit is twice the error, as in an export.
    """
    try:
        check_replays(replays)
    except ParityError as error:
        if not is_allowed:
            raise ParityError(
                f"{error.message}; nothing was stored; to accept this error,",
                remedies={"allow_numerical_error": True},
            ) from error

    return {
        name: 2 * max(each.deviation[name] for each in replays)
        for name, tolerance in replays[0].tolerance.items()
        if any(each.deviation[name] > tolerance for each in replays)
    }


def replay_probes(
    trt: Any,
    cuda: Cuda,
    bundle: Bundle,
    plan: bytes,
    key: EngineKey,
    accepted_errors: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Replay, ...]:
    """Run the bundle's probes on the TensorRT engine in *plan*, at the smallest and largest batch of every profile.

    Batches of different profiles alternate: a context must not disturb another one. The replays
    have the bundle's tolerances, or *accepted_errors* if these are larger.
    Raises `ParityError` if an output has another shape or is not finite, and `BundleError` if an
    output has no probes.
    """
    probes = read_probes(bundle).accepting(accepted_errors)
    sizes = sorted(
        {size for profile in key.profiles for size in (profile.minimum, profile.maximum)}
    )

    with closing(EngineSession(trt, cuda, plan, bundle.manifest, key)) as session:
        return replay_in_turn(
            {size: probes.in_whole_batches(size) for size in sizes}, session.run
        )
