"""`sopdeploy bench`: measure the latency of a bundle on this machine by batch size.

The probes are replayed first, so that a network with wrong outputs is never timed. Only the network is timed:
after a warm-up, in wall-clock time, on decoded images. Two bundles are timed alternately, so that the load of
the machine affects both; a ratio is the quotient of their medians.
"""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.environment import installed, machine
from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings

WARMUP_RUNS = 3
MIN_RUNS, MAX_RUNS = 10, 1000
BUDGET_SECONDS = 2.0  # of timed runs of one bundle at one batch size
_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "sopdeploy", "tensorrt")
_SEED = 0


class Latency(StrictModel):
    """Milliseconds per run, over `num_runs` warm runs, and images per second at the median."""

    batch: int
    num_runs: int
    median_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float


class BundleLatencies(StrictModel):
    """One bundle, its runtime, and its latency at each batch size."""

    bundle: str
    id: str
    precision: str
    runtime: str
    device: str
    latencies: tuple[Latency, ...]


class Benchmark(StrictModel):
    """The result; `ratios` by batch size are below 1 where the first bundle is faster than *against*."""

    machine: dict[str, str | int | float]
    versions: dict[str, str]
    threads: int | None
    ours: BundleLatencies
    other: BundleLatencies | None = None
    ratios: dict[str, float] = pydantic.Field(default_factory=dict)


def bench(
    path: Path,
    settings: Settings,
    batches: Sequence[int] = (1, 8),
    against: Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure the bundle at *path*, alternating with the bundle *against*.

    Calls *step* with the name of each step. Raises the errors of `load_model`, and `ConfigError` for a batch
    size that a bundle does not support.
    """
    step("opening and replaying the probes")
    bundles = [load_model(each, settings) for each in (path, against) if each is not None]
    for loaded in bundles:
        largest = loaded.runtime.largest_batch
        if wrong := [batch for batch in batches if not 1 <= batch <= largest]:
            raise ConfigError(
                f"{loaded.bundle.name} takes batches of 1 to {largest}, not of {wrong[0]}"
                "; choose sizes in this range"
            )
    seconds = {}
    for batch in batches:
        step(f"timing batches of {batch}")
        seconds[batch] = _time_runs(bundles, batch)
    measured = [
        BundleLatencies(
            bundle=loaded.bundle.name,
            id=loaded.bundle.manifest.id,
            precision=loaded.bundle.manifest.precision,
            runtime=loaded.runtime.name,
            device=loaded.runtime.device,
            latencies=tuple(_summarize(batch, times[index]) for batch, times in seconds.items()),
        )
        for index, loaded in enumerate(bundles)
    ]
    ours, other = measured[0], measured[1] if against is not None else None
    pairs = zip(ours.latencies, other.latencies, strict=True) if other is not None else ()
    return Benchmark(
        machine=machine(),
        versions={"python": platform.python_version(), **installed(_PACKAGES)},
        threads=settings.threads,
        ours=ours,
        other=other,
        ratios={str(first.batch): first.median_ms / second.median_ms for first, second in pairs},
    )


def _time_runs(bundles: Sequence[LoadedModel], batch: int) -> list[list[float]]:
    """Time alternating runs of the bundles on noise images within the budget."""
    shapes = [(batch, *loaded.bundle.manifest.image_shape) for loaded in bundles]
    images = [np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    seconds: list[list[float]] = [[] for _ in bundles]
    for _ in range(WARMUP_RUNS):
        for loaded, pixels in zip(bundles, images, strict=True):
            loaded.runtime.run(pixels)
    while len(seconds[0]) < MAX_RUNS and (
        len(seconds[0]) < MIN_RUNS or max(map(sum, seconds)) < BUDGET_SECONDS
    ):
        for loaded, pixels, times in zip(bundles, images, seconds, strict=True):
            start = time.perf_counter()
            loaded.runtime.run(pixels)
            times.append(time.perf_counter() - start)
    return seconds


def _summarize(batch: int, seconds: Sequence[float]) -> Latency:
    """Compute the percentiles of *seconds*."""
    median, p95, p99 = (float(value) * 1e3 for value in np.percentile(seconds, (50, 95, 99)))
    return Latency(
        batch=batch,
        num_runs=len(seconds),
        median_ms=median,
        p95_ms=p95,
        p99_ms=p99,
        images_per_s=batch / median * 1e3,
    )
