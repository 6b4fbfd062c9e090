"""Build or find the TensorRT engine of a bundle for this machine, without torch.

An engine is kept only if it reproduces the bundle's probes. A layer with another precision than requested
causes a warning, or an error with `strict`.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import Probes, read_probes, replay
from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import import_tensorrt, version_of
from sopdeploy.tensorrt.cache import NoEngine, cache_folder, look, records, store, write_whole
from sopdeploy.tensorrt.cuda import Cuda, Gpu, open_cuda
from sopdeploy.tensorrt.profiles import Profile, parse_profiles
from sopdeploy.tensorrt.record import EngineKey, EngineRecord, Hazard, ProbeReplay, Receipt
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.tensorrt.build import BuildRequest, build, inspect
from sopdeploy_export.tensorrt.lint import GRAPH_PRECISION, check_precision, lint
from sopdeploy_export.tensorrt.options import EngineOptions
from sopdeploy_export.tensorrt.precision_check import check_engine_precision
from sopdeploy_export.tensorrt.progress import Report

WORKSPACE_DIVISOR = 4  # the builder may use a quarter of the GPU's memory


@dataclass(frozen=True)
class Engine:
    """A plan in the cache and its record; `reason` says why it was built, or is None if it was cached."""

    path: Path
    record: EngineRecord
    reason: str | None


@dataclass(frozen=True)
class Machine:
    """TensorRT and the GPU of this machine."""

    trt: Any
    cuda: Cuda
    gpu: Gpu


def this_machine() -> Machine:
    """Load TensorRT and open the GPU.

    Raises `RuntimeUnavailableError` if either is missing.
    """
    trt = import_tensorrt()
    cuda = open_cuda()
    return Machine(trt=trt, cuda=cuda, gpu=cuda.gpu())


def make_key(
    bundle: Bundle, options: EngineOptions, profiles: Sequence[Profile], tensorrt: str, gpu: Gpu
) -> EngineKey:
    """Compute the cache key of the engine of *bundle* with *options*.

    A precision of the graph that has another name in the bundle (`bf16`) gets that name, by which servers
    find the engine.
    """
    own = bundle.manifest.precision
    requested = options.precision or own
    return EngineKey(
        bundle=bundle.name,
        bundle_onnx=bundle.manifest.files[bundle.onnx.name].sha256,
        tensorrt=tensorrt,
        gpu=gpu.name,
        architecture=gpu.architecture,
        precision=own if requested == GRAPH_PRECISION.get(own) else requested,
        profiles=tuple(profiles),
        level=options.level,
    )


def get_engine(bundle: Bundle, options: EngineOptions, report: Report = lambda _: None) -> Engine:
    """Find the engine of *bundle* for this machine in the cache, or build it; replay the probes on it.

    *report* receives the progress. Raises `RuntimeUnavailableError` without TensorRT or a GPU,
    `LoweringError` or `EngineError` if no engine can be built, and `ParityError` if its outputs deviate from
    the probes.
    """
    profiles = parse_profiles(options.profiles, bundle.manifest.batch)
    machine = this_machine()
    key = make_key(bundle, options, profiles, str(machine.trt.__version__), machine.gpu)
    folder = cache_folder(bundle, options.cache)
    found = NoEngine("--rebuild was given") if options.rebuild else look(folder, key)
    if not isinstance(found, NoEngine):
        report("replaying the probes on the cached engine")
        check_receipt(found.record.receipt, strict=options.strict)
        replay_probes(machine, bundle, found.plan, key)
        return Engine(path=folder / f"{key.name}.plan", record=found.record, reason=None)
    report(f"building: {found.reason}")
    begin = time.monotonic()
    built = _build_plan(machine, bundle, key, folder, report)
    check_receipt(built.receipt, strict=options.strict)
    record = EngineRecord(
        key=key,
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        plan_bytes=len(built.plan),
        parsed_onnx_sha256=built.onnx_sha256,
        build_seconds=round(time.monotonic() - begin, 3),
        hazards=built.hazards,
        receipt=built.receipt,
        replays=replay_probes(machine, bundle, built.plan, key),
    )
    return Engine(path=store(folder, built.plan, record), record=record, reason=found.reason)


def check_receipt(receipt: Receipt, *, strict: bool) -> None:
    """Raise `EngineError` with the first warning of *receipt* if *strict*."""
    if strict and receipt.warnings:
        more = f" (and {len(receipt.warnings) - 1} more)" if receipt.warnings[1:] else ""
        raise EngineError(f"{receipt.warnings[0]}{more}; without --strict this is only a warning")


@dataclass(frozen=True)
class BuildResult:
    """A plan, the sha256 of the linted graph, the lint's rewrites, and the precision of the layers."""

    plan: bytes
    onnx_sha256: str
    hazards: tuple[Hazard, ...]
    receipt: Receipt


def _build_plan(
    machine: Machine, bundle: Bundle, key: EngineKey, folder: Path, report: Report
) -> BuildResult:
    trt, model = machine.trt, onnx.load(bundle.onnx)
    version = version_of(trt)
    check_precision(model, key.precision, version)
    safe, hazards = lint(model, version, key.profiles)
    graph = safe.SerializeToString(deterministic=True)
    # The timing cache is valid for one TensorRT version and one GPU model.
    digest = hashlib.sha256(f"{trt.__version__} {machine.gpu.name}".encode()).hexdigest()[:8]
    timings = folder / f"timing-{trt.__version__}-{machine.gpu.architecture}-{digest}.cache"
    request = BuildRequest(
        onnx=graph,
        profiles=key.profiles,
        level=key.level,
        workspace=machine.gpu.memory // WORKSPACE_DIVISOR,
        timing_cache=timings.read_bytes() if timings.is_file() else b"",
        last_build=max((record.build_seconds for record in records(folder)), default=None),
    )
    built = build(trt, request, report)
    if built.timing_cache:
        write_whole(timings, built.timing_cache)
    report("checking precision and outputs")
    receipt = check_engine_precision(safe, key.precision, inspect(trt, built.plan))
    return BuildResult(built.plan, hashlib.sha256(graph).hexdigest(), hazards, receipt)


def replay_probes(machine: Machine, bundle: Bundle, plan: bytes, key: EngineKey) -> tuple[ProbeReplay, ...]:
    """Run the bundle's probes on the engine in *plan*, at the smallest and largest batch of every profile.

    Raises `ParityError` if an output deviates by more than the bundle's tolerance.
    """
    probes = read_probes(bundle.probes)
    count = len(probes.images)
    if not count or set(probes.expected) != {t.name for t in bundle.manifest.outputs}:
        raise EngineError(
            f"{bundle.probes}: has no probes for some output, so the engine cannot be verified"
            "; export the bundle again"
        )
    sizes = sorted({size for profile in key.profiles for size in (profile.minimum, profile.maximum)})
    replays = []
    with closing(EngineSession(machine.trt, machine.cuda, plan, bundle.manifest, key)) as session:
        for size in sizes:
            indices = np.arange(-(-count // size) * size) % count  # repeat images to fill whole batches
            repeated = Probes(
                images=probes.images[indices],
                expected={name: values[indices] for name, values in probes.expected.items()},
                tolerance=probes.tolerance,
            )
            found = replay(repeated, session.run, batch=size)
            replays.append(
                ProbeReplay(
                    batch=size, images=found.images, deviation=found.deviation, tolerance=found.tolerance
                )
            )
    return tuple(replays)
