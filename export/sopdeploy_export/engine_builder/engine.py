"""Build or find the TensorRT engine of a bundle for this machine; without torch, unless by torch-tensorrt.

An engine is kept only if it reproduces the bundle's probes. `plan_engine` plans a build without a GPU and
without TensorRT.
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

from sopdeploy.bundle.folder import PROGRAM, Bundle
from sopdeploy.bundle.probes import Probes, Replay, read_probes, replay
from sopdeploy.config import StrictModel
from sopdeploy.errors import EngineError, RuntimeUnavailableError
from sopdeploy.tensorrt.binding import import_tensorrt
from sopdeploy.tensorrt.cache import (
    EngineKey,
    EngineRecord,
    Hazard,
    Profile,
    StoredEngine,
    cache_folder,
    load_engine,
    merge_profiles,
    parse_profiles,
    store_engine,
    write_atomically,
)
from sopdeploy.tensorrt.cuda import Cuda, Gpu, open_cuda
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.engine_builder.build import BuildRequest, Report, parse_and_build
from sopdeploy_export.engine_builder.lint import lint
from sopdeploy_export.options import EngineOptions


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

    @property
    def workspace(self) -> int:
        """Bytes that a build may use: a quarter of the GPU's memory."""
        return self.gpu.memory // 4


class EnginePlan(StrictModel):
    """The plan of a build; `key_unknown` says why there is no `key`."""

    bundle: str
    precision: str
    profiles: tuple[Profile, ...]
    hazards: tuple[Hazard, ...]
    key: str | None
    key_unknown: str | None


def this_machine() -> Machine:
    """Load TensorRT and open the GPU.

    Raises `RuntimeUnavailableError` if either is missing.
    """
    trt = import_tensorrt()
    cuda = open_cuda()
    return Machine(trt=trt, cuda=cuda, gpu=cuda.gpu())


def plan_engine(bundle: Bundle, options: EngineOptions) -> EnginePlan:
    """Plan the build of *bundle*; raise `LoweringError` if TensorRT would reject the graph."""
    profiles = requested_profiles(bundle, options)
    key = reason = None
    try:
        tensorrt = str(import_tensorrt().__version__)
        key = engine_key(bundle, options, profiles, tensorrt, open_cuda().gpu()).name
    except RuntimeUnavailableError as error:
        reason = str(error)
    _, hazards = lint(onnx.load(bundle.onnx), profiles)
    return EnginePlan(
        bundle=bundle.name,
        precision=bundle.manifest.precision,
        profiles=profiles,
        hazards=hazards,
        key=key,
        key_unknown=reason,
    )


def requested_profiles(bundle: Bundle, options: EngineOptions) -> tuple[Profile, ...]:
    """Return the optimization profiles of an engine of *bundle*; torch-tensorrt builds plans with one."""
    profiles = parse_profiles(options.profiles, bundle.manifest.batch)
    return (merge_profiles(profiles),) if options.via == "torch-tensorrt" else profiles


def engine_key(
    bundle: Bundle, options: EngineOptions, profiles: Sequence[Profile], tensorrt: str, gpu: Gpu
) -> EngineKey:
    """Return the cache key of the engine of *bundle* with *options*."""
    return EngineKey(
        bundle=bundle.name,
        bundle_onnx=bundle.manifest.files[bundle.onnx.name].sha256,
        tensorrt=tensorrt,
        gpu=gpu.name,
        architecture=gpu.architecture,
        precision=bundle.manifest.precision,
        profiles=tuple(profiles),
        via=options.via,
    )


def get_engine(bundle: Bundle, options: EngineOptions, report: Report = lambda _: None) -> Engine:
    """Find the engine of *bundle* for this machine in the cache, or build it; replay the probes on it.

    *report* receives the progress. Raises `RuntimeUnavailableError` without TensorRT or a GPU,
    `LoweringError` or `EngineError` if no engine can be built, and `ParityError` if its outputs deviate from
    the probes.
    """
    profiles = requested_profiles(bundle, options)
    machine = this_machine()
    key = engine_key(bundle, options, profiles, str(machine.trt.__version__), machine.gpu)
    folder = cache_folder(bundle, options.cache)
    cached = "--rebuild was given" if options.rebuild else load_engine(folder, key)
    if isinstance(cached, StoredEngine):
        report("replaying the probes on the cached engine")
        replay_probes(machine, bundle, cached.plan, key)
        return Engine(path=folder / f"{key.name}.plan", record=cached.record, reason=None)
    report(f"building: {cached}")
    plan, record = build_plan(machine, bundle, key, folder, report)
    record = record.model_copy(update={"replays": replay_probes(machine, bundle, plan, key)})
    return Engine(path=store_engine(folder, plan, record), record=record, reason=cached)


def build_plan(
    machine: Machine, bundle: Bundle, key: EngineKey, folder: Path, report: Report
) -> tuple[bytes, EngineRecord]:
    """Build the plan for *key*; return it with its record, without replays."""
    begin = time.monotonic()
    hazards: tuple[Hazard, ...] = ()
    if key.via == "torch-tensorrt":
        from sopdeploy_export.engine_builder.from_program import build_from_program  # noqa: PLC0415 # torch

        plan = build_from_program(bundle, key.profiles[0], machine.workspace)
        source_sha256 = bundle.manifest.files[PROGRAM].sha256
    else:
        model, hazards = lint(onnx.load(bundle.onnx), key.profiles)
        graph = model.SerializeToString(deterministic=True)
        source_sha256 = hashlib.sha256(graph).hexdigest()
        plan = build_from_onnx(machine, graph, key, folder, report)
    report("checking outputs")
    record = EngineRecord(
        key=key,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        source_sha256=source_sha256,
        build_seconds=round(time.monotonic() - begin, 3),
        hazards=hazards,
        replays=(),
    )
    return plan, record


def build_from_onnx(machine: Machine, graph: bytes, key: EngineKey, folder: Path, report: Report) -> bytes:
    """Build the plan of *graph*; read and update the timing cache in *folder*.

    A timing cache is valid for one TensorRT version and one GPU model.
    """
    tensorrt, gpu = machine.trt.__version__, machine.gpu
    digest = hashlib.sha256(f"{tensorrt} {gpu.name}".encode()).hexdigest()[:8]
    cache_file = folder / f"timing-{tensorrt}-{gpu.architecture}-{digest}.cache"
    request = BuildRequest(
        onnx=graph,
        profiles=key.profiles,
        workspace=machine.workspace,
        timing_cache=cache_file.read_bytes() if cache_file.is_file() else b"",
    )
    plan, timing_cache = parse_and_build(machine.trt, request, report)
    if timing_cache:
        write_atomically(cache_file, timing_cache)
    return plan


def replay_probes(machine: Machine, bundle: Bundle, plan: bytes, key: EngineKey) -> tuple[Replay, ...]:
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
            replays.append(replay(repeated, session.run, batch=size))
    return tuple(replays)
