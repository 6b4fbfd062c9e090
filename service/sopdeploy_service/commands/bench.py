"""`sopdeploy bench`: how fast is a bundle on this machine? Warm, by batch size, with all a figure needs.

The probes are replayed first, so that nothing is timed that computes something else. Calls are timed by the
clock on the wall, the network alone, pictures already decoded. Against another bundle the two are called in
turn, so that a busy machine slows both; a ratio is the median of ours over the median of theirs.
"""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.environment import installed, machine
from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings

WARMUPS = 3
FEWEST, MOST = 10, 1000
BUDGET_S = 2.0  # of timed calls for one batch size of one bundle
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "sopdeploy", "tensorrt")
SEED = 0


class Latency(StrictModel):
    """Milliseconds of one call, over `runs` warm calls, and images per second at the median."""

    batch: int
    runs: int
    median_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float


class Measured(StrictModel):
    """One bundle: what it is, what ran it, and a latency for each batch size."""

    bundle: str
    id: str
    precision: str
    runtime: str
    device: str
    latencies: tuple[Latency, ...]


class Benchmark(StrictModel):
    """What was measured; `ratios` are ours over the other median, by batch size; below 1 ours is faster."""

    machine: dict[str, str | int | float]
    versions: dict[str, str]
    threads: int | None
    ours: Measured
    other: Measured | None = None
    ratios: dict[str, float] = pydantic.Field(default_factory=dict)


def bench(
    path: Path,
    settings: Settings,
    batches: Sequence[int] = (1, 8),
    against: Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Return latencies of the bundle at *path*, and of the one *against* which it is measured in turn.

    Raises what opening a bundle raises, and `ConfigError` for a batch that a bundle does not take.
    """
    step("opening and replaying the probes")
    sides = [load_model(path, settings)]
    if against is not None:
        sides.append(load_model(against, settings))
    for side in sides:
        refuse_batches(side, batches)
    latencies: list[list[Latency]] = [[] for _ in sides]
    for batch in batches:
        step(f"timing batches of {batch}")
        for found, seconds in zip(latencies, timed(sides, batch), strict=True):
            found.append(latency(batch, seconds))
    measured = [record(side, tuple(found)) for side, found in zip(sides, latencies, strict=True)]
    return Benchmark(
        machine=machine(),
        versions={"python": platform.python_version(), **installed(PACKAGES)},
        threads=settings.threads,
        ours=measured[0],
        other=measured[1] if against is not None else None,
        ratios=ratios(measured),
    )


def refuse_batches(side: LoadedModel, batches: Sequence[int]) -> None:
    """Refuse batch sizes that the bundle was not verified for."""
    largest = side.runtime.largest_batch
    for batch in batches:
        if not 1 <= batch <= largest:
            raise ConfigError(f"--batch: {side.bundle.name} takes batches of 1 to {largest}, not of {batch}")


def timed(sides: Sequence[LoadedModel], batch: int) -> tuple[list[float], ...]:
    """Return the seconds of calls of every side, made in turn, for as long as the budget lasts."""
    pictures = [images_for(side, batch) for side in sides]
    seconds: tuple[list[float], ...] = tuple([] for _ in sides)
    for _ in range(WARMUPS):
        for side, images in zip(sides, pictures, strict=True):
            side.runtime.run(images)
    while len(seconds[0]) < MOST and (len(seconds[0]) < FEWEST or max(map(sum, seconds)) < BUDGET_S):
        for side, images, taken in zip(sides, pictures, seconds, strict=True):
            start = time.perf_counter()
            side.runtime.run(images)
            taken.append(time.perf_counter() - start)
    return seconds


def images_for(side: LoadedModel, batch: int) -> NDArray[np.uint8]:
    """Return *batch* noise images of the size that the bundle takes."""
    shape = (batch, *side.bundle.manifest.image_shape)
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def latency(batch: int, seconds: Sequence[float]) -> Latency:
    """Return the figures of *seconds*."""
    median, p95, p99 = (float(value) * 1e3 for value in np.percentile(seconds, (50, 95, 99)))
    return Latency(
        batch=batch,
        runs=len(seconds),
        median_ms=median,
        p95_ms=p95,
        p99_ms=p99,
        images_per_s=batch / median * 1e3,
    )


def record(side: LoadedModel, latencies: tuple[Latency, ...]) -> Measured:
    """Return what is said of one bundle."""
    manifest = side.bundle.manifest
    return Measured(
        bundle=manifest.name,
        id=manifest.id,
        precision=manifest.precision,
        runtime=side.runtime.name,
        device=side.runtime.device,
        latencies=latencies,
    )


def ratios(measured: Sequence[Measured]) -> dict[str, float]:
    """Return ours over the other's median by batch size; nothing where there is no other."""
    if len(measured) < 2:
        return {}
    pairs = zip(measured[0].latencies, measured[1].latencies, strict=True)
    return {str(ours.batch): ours.median_ms / other.median_ms for ours, other in pairs}
