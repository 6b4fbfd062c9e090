"""`sopdeploy engine`: an engine of a bundle for this machine, from the cache or built with proof. No torch.

Read from top to bottom: lint, key, cache, build, receipt, probes on the engine, cache. Nothing is kept that
was not seen to have the precision asked for and to give the bundle's numbers.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import Probes, read_probes, replay
from sopdeploy.config import StrictModel
from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import import_tensorrt, make_logger, version_of
from sopdeploy.tensorrt.cache import NoEngine, cache_folder, look, records, store, write_whole
from sopdeploy.tensorrt.cuda import Cuda, Gpu, open_cuda
from sopdeploy.tensorrt.profiles import Profile, parse_profiles
from sopdeploy.tensorrt.record import EngineKey, EngineRecord, Hazard, ProbeReplay, Receipt, Via
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.tensorrt.build import BuildRequest, Built, Tell, build, inspect
from sopdeploy_export.tensorrt.lint import lint, refuse_another_precision
from sopdeploy_export.tensorrt.precision_check import receipt, receipt_without_operators
from sopdeploy_export.tensorrt.torch_tensorrt import (
    PROGRAM,
    build_by_torch,
    one_profile,
    refuse_without_program,
)

WORKSPACE_SHARE = 4  # a quarter of the GPU's memory may be workspace while it builds


class EngineOptions(StrictModel):
    """What a user may ask of an engine."""

    precision: str | None = None  # None: the bundle's
    profiles: str | None = None  # None: the bundle's batch range
    level: int = 3
    cache: Path | None = None  # None: beside the bundle
    rebuild: bool = False
    via: Via = "onnx"


@dataclass(frozen=True)
class Engine:
    """A plan in the cache, its record, and why it was built; no reason where it was there already."""

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
    """Return TensorRT and the GPU; raises `RuntimeUnavailableError` where one is missing."""
    trt = import_tensorrt()
    cuda = open_cuda()
    return Machine(trt=trt, cuda=cuda, gpu=cuda.gpu())


def make_key(
    bundle: Bundle, options: EngineOptions, profiles: Sequence[Profile], tensorrt: str, gpu: Gpu
) -> EngineKey:
    """Return the key of the engine of *bundle* that *options* ask for, on this machine."""
    return EngineKey(
        bundle=bundle.name,
        bundle_onnx=bundle.manifest.files[bundle.onnx.name].sha256,
        tensorrt=tensorrt,
        gpu=gpu.name,
        architecture=gpu.architecture,
        precision=options.precision or bundle.manifest.precision,
        profiles=tuple(profiles),
        level=options.level,
        via=options.via,
    )


def profiles_of(bundle: Bundle, options: EngineOptions) -> tuple[Profile, ...]:
    """Return the profiles that *options* ask for; raises where *bundle* cannot go the way they ask for."""
    profiles = parse_profiles(options.profiles, bundle.manifest.batch)
    if options.via == "onnx":
        return profiles
    refuse_without_program(bundle, options.precision)
    return (one_profile(profiles, bundle.manifest.batch),)


def engine(bundle: Bundle, options: EngineOptions, tell: Tell = lambda _: None) -> Engine:
    """Return a checked engine of *bundle* for this machine, built where the cache has none.

    Raises `RuntimeUnavailableError` without TensorRT or a GPU, `LoweringError` or `EngineError` where no
    right engine can be built, `ParityError` where it gives other numbers than the bundle's probes.
    """
    profiles = profiles_of(bundle, options)
    machine = this_machine()
    key = make_key(bundle, options, profiles, str(machine.trt.__version__), machine.gpu)
    folder = cache_folder(bundle, options.cache)
    found = NoEngine("--rebuild was given") if options.rebuild else look(folder, key)
    if not isinstance(found, NoEngine):
        tell("replaying the probes on the engine in the cache")
        replay_probes(machine, bundle, found.plan, key)
        return Engine(path=folder / f"{key.name}.plan", record=found.record, reason=None)
    tell(f"building: {found.reason}")
    plan, record = build_checked(machine, bundle, key, folder, tell)
    return Engine(path=store(folder, plan, record), record=record, reason=found.reason)


def build_checked(
    machine: Machine, bundle: Bundle, key: EngineKey, folder: Path, tell: Tell
) -> tuple[bytes, EngineRecord]:
    """Return a new plan for *key* and its record, after receipt and probes."""
    begin = time.monotonic()
    way = by_torch if key.via == "torch-tensorrt" else by_onnx
    made = way(machine, bundle, key, folder, tell)
    record = EngineRecord(
        key=key,
        plan_sha256=hashlib.sha256(made.plan).hexdigest(),
        plan_bytes=len(made.plan),
        parsed_onnx_sha256=made.graph_sha256,
        build_seconds=round(time.monotonic() - begin, 3),
        hazards=made.hazards,
        receipt=made.receipt,
        replays=replay_probes(machine, bundle, made.plan, key),
    )
    return made.plan, record


@dataclass(frozen=True)
class BuildResult:
    """A plan, the sha256 of what it was made of, what the lint rewrote, what the inspector showed."""

    plan: bytes
    graph_sha256: str
    hazards: tuple[Hazard, ...]
    receipt: Receipt


def by_torch(machine: Machine, bundle: Bundle, key: EngineKey, _folder: Path, tell: Tell) -> BuildResult:
    """Return the plan that torch-tensorrt makes of the bundle's exported program."""
    tell("torch-tensorrt is building, which tells no progress")
    plan = build_by_torch(bundle, key, machine.gpu.memory // WORKSPACE_SHARE)
    tell("comparing precision and numbers")
    information = inspect(machine.trt, plan, make_logger(machine.trt))
    return BuildResult(
        plan, bundle.manifest.files[PROGRAM].sha256, (), receipt_without_operators(information)
    )


def by_onnx(machine: Machine, bundle: Bundle, key: EngineKey, folder: Path, tell: Tell) -> BuildResult:
    """Return the plan that TensorRT makes of the bundle's graph, after the lint."""
    model = onnx.load(bundle.onnx)
    version = version_of(machine.trt)
    refuse_another_precision(model, key.precision, version)
    safe, hazards = lint(model, version, key.profiles)
    graph = safe.SerializeToString(deterministic=True)
    timings = folder / timing_cache_name(machine)
    request = BuildRequest(
        onnx=graph,
        profiles=key.profiles,
        precision=key.precision,
        level=key.level,
        workspace=machine.gpu.memory // WORKSPACE_SHARE,
        timing_cache=timings.read_bytes() if timings.is_file() else b"",
        last_build=last_build_seconds(folder),
    )
    built = build(machine.trt, request, tell)
    keep_timings(timings, built)
    tell("comparing precision and numbers")
    found = receipt(safe, key.precision, built.information)
    return BuildResult(built.plan, hashlib.sha256(graph).hexdigest(), hazards, found)


def timing_cache_name(machine: Machine) -> str:
    """Return the name of the timing cache, which is good for one TensorRT and one kind of GPU."""
    kind = hashlib.sha256(f"{machine.trt.__version__} {machine.gpu.name}".encode()).hexdigest()[:8]
    return f"timing-{machine.trt.__version__}-{machine.gpu.architecture}-{kind}.cache"


def keep_timings(path: Path, built: Built) -> None:
    """Keep the timings of a build, so that the next one is several times faster."""
    if built.timing_cache:
        write_whole(path, built.timing_cache)


def last_build_seconds(folder: Path) -> float | None:
    """Return how long the slowest build of this bundle took, for an estimate."""
    return max((record.build_seconds for record in records(folder)), default=None)


def replay_probes(machine: Machine, bundle: Bundle, plan: bytes, key: EngineKey) -> tuple[ProbeReplay, ...]:
    """Return the replays of the bundle's probes on the engine in *plan*, in batches of every profile.

    Raises `ParityError` where a number deviates by more than the bundle allows.
    """
    probes = read_probes(bundle.probes)
    if not len(probes.images) or set(probes.expected) != {t.name for t in bundle.manifest.outputs}:
        raise EngineError(f"{bundle.probes}: does not probe every output; nothing would be proved")
    sizes = sorted({size for profile in key.profiles for size in (profile.minimum, profile.maximum)})
    with EngineSession(machine.trt, machine.cuda, plan, bundle.manifest, key) as session:
        replays = {size: replay(fill(probes, size), session.run, batch=size) for size in sizes}
    return tuple(
        ProbeReplay(batch=size, images=r.images, deviation=r.deviation, tolerance=r.tolerance)
        for size, r in replays.items()
    )


def fill(probes: Probes, size: int) -> Probes:
    """Return *probes*, repeated until they fill whole batches of *size*."""
    count = len(probes.images)
    indices = np.arange(-(-count // size) * size) % count
    return Probes(
        images=probes.images[indices],
        expected={name: values[indices] for name, values in probes.expected.items()},
        tolerance=probes.tolerance,
    )
