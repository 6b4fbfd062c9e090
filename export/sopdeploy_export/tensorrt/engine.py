"""Build or find the TensorRT engine of a bundle for this machine; without torch, unless by torch-tensorrt.

An engine is kept only if it reproduces the bundle's probes. A layer with another precision than requested
causes a warning, or an error with `strict`.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import Probes, read_probes, replay
from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import import_tensorrt, version_of
from sopdeploy.tensorrt.cache import cache_folder, load_engine, store, write_whole
from sopdeploy.tensorrt.cuda import Cuda, Gpu, open_cuda
from sopdeploy.tensorrt.profiles import Profile, merge_profiles, parse_profiles
from sopdeploy.tensorrt.record import EngineKey, EngineRecord, Hazard, ProbeReplay, Receipt
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.tensorrt.build import BuildRequest, build, inspect
from sopdeploy_export.tensorrt.lint import GRAPH_PRECISION, check_precision, lint
from sopdeploy_export.tensorrt.options import EngineOptions
from sopdeploy_export.tensorrt.precision_check import check_engine_precision, list_precisions
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


class BuiltEngine(NamedTuple):
    """A plan, the sha256 of its source, what the lint changed, and the precision of the layers."""

    plan: bytes
    source_sha256: str
    hazards: tuple[Hazard, ...]
    receipt: Receipt


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
        via=options.via,
    )


def get_engine(bundle: Bundle, options: EngineOptions, report: Report = lambda _: None) -> Engine:
    """Find the engine of *bundle* for this machine in the cache, or build it; replay the probes on it.

    *report* receives the progress. Raises `RuntimeUnavailableError` without TensorRT or a GPU,
    `LoweringError` or `EngineError` if no engine can be built, and `ParityError` if its outputs deviate from
    the probes.
    """
    profiles = parse_profiles(options.profiles, bundle.manifest.batch)
    if options.via == "torch-tensorrt":
        profiles = (merge_profiles(profiles),)  # it builds plans with one profile
    machine = this_machine()
    key = make_key(bundle, options, profiles, str(machine.trt.__version__), machine.gpu)
    folder = cache_folder(bundle, options.cache)
    found = "--rebuild was given" if options.rebuild else load_engine(folder, key)
    if not isinstance(found, str):
        report("replaying the probes on the cached engine")
        check_receipt(found.record.receipt, strict=options.strict)
        replay_probes(machine, bundle, found.plan, key)
        return Engine(path=folder / f"{key.name}.plan", record=found.record, reason=None)
    report(f"building: {found}")
    plan, record = _build(machine, bundle, key, folder, report)
    check_receipt(record.receipt, strict=options.strict)
    record = record.model_copy(update={"replays": replay_probes(machine, bundle, plan, key)})
    return Engine(path=store(folder, plan, record), record=record, reason=found)


def check_receipt(receipt: Receipt, *, strict: bool) -> None:
    """Raise `EngineError` with the first warning of *receipt* if *strict*."""
    if strict and receipt.warnings:
        more = f" (and {len(receipt.warnings) - 1} more)" if receipt.warnings[1:] else ""
        raise EngineError(f"{receipt.warnings[0]}{more}; without --strict this is only a warning")


def _build(
    machine: Machine, bundle: Bundle, key: EngineKey, folder: Path, report: Report
) -> tuple[bytes, EngineRecord]:
    """Build the plan for *key*; return it with its record, without replays."""
    begin = time.monotonic()
    if key.via == "torch-tensorrt":
        made = _build_from_program(machine, bundle, key)
    else:
        made = _build_from_onnx(machine, bundle, key, folder, report)
    record = EngineRecord(
        key=key,
        plan_sha256=hashlib.sha256(made.plan).hexdigest(),
        plan_bytes=len(made.plan),
        source_sha256=made.source_sha256,
        build_seconds=round(time.monotonic() - begin, 3),
        hazards=made.hazards,
        receipt=made.receipt,
        replays=(),
    )
    return made.plan, record


def _build_from_program(machine: Machine, bundle: Bundle, key: EngineKey) -> BuiltEngine:
    from sopdeploy_export.tensorrt.from_program import build_from_program, program_of  # noqa: PLC0415 # torch

    workspace = machine.gpu.memory // WORKSPACE_DIVISOR
    source = bundle.manifest.files[program_of(bundle).name].sha256
    plan = build_from_program(bundle, key.profiles[0], key.level, workspace)
    receipt = list_precisions(key.precision, inspect(machine.trt, plan))
    return BuiltEngine(plan, source, (), receipt)


def _build_from_onnx(
    machine: Machine, bundle: Bundle, key: EngineKey, folder: Path, report: Report
) -> BuiltEngine:
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
    )
    plan, timing_cache = build(trt, request, report)
    if timing_cache:
        write_whole(timings, timing_cache)
    report("checking precision and outputs")
    receipt = check_engine_precision(safe, key.precision, inspect(trt, plan))
    return BuiltEngine(plan, hashlib.sha256(graph).hexdigest(), hazards, receipt)


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
