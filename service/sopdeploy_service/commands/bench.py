"""`sopdeploy bench`: measure the latency of a bundle on this machine by batch size.

The probes are replayed first, so that a network with wrong outputs is never timed. Only the network is timed:
after a warm-up, in wall-clock time, on decoded images.
"""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

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


class Benchmark(StrictModel):
    """One bundle, its runtime and machine, and its latency at each batch size."""

    bundle: str
    id: str
    precision: str
    runtime: str
    device: str
    threads: int | None
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    latencies: tuple[Latency, ...]


def bench(
    path: Path,
    settings: Settings,
    batches: Sequence[int] = (1, 8),
    step: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure the bundle at *path*; call *step* with the name of each step.

    Raises the errors of `load_model`, and `ConfigError` for a batch size that the bundle does not support.
    """
    step("opening and replaying the probes")
    loaded = load_model(path, settings)
    bundle, runtime = loaded.bundle, loaded.runtime
    if wrong := [batch for batch in batches if not 1 <= batch <= runtime.largest_batch]:
        raise ConfigError(
            f"{bundle.name} takes batches of 1 to {runtime.largest_batch}, not of {wrong[0]}"
            "; choose sizes in this range"
        )
    latencies = []
    for batch in batches:
        step(f"timing batches of {batch}")
        latencies.append(_summarize(batch, _time_runs(loaded, batch)))
    return Benchmark(
        bundle=bundle.name,
        id=bundle.manifest.id,
        precision=bundle.manifest.precision,
        runtime=runtime.name,
        device=runtime.device,
        threads=settings.threads,
        machine=machine(),
        versions={"python": platform.python_version(), **installed(_PACKAGES)},
        latencies=tuple(latencies),
    )


def _time_runs(loaded: LoadedModel, batch: int) -> list[float]:
    """Time runs on noise images within the budget."""
    shape = (batch, *loaded.bundle.manifest.image_shape)
    images = np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8)
    for _ in range(WARMUP_RUNS):
        loaded.runtime.run(images)
    seconds: list[float] = []
    while len(seconds) < MIN_RUNS or (len(seconds) < MAX_RUNS and sum(seconds) < BUDGET_SECONDS):
        start = time.perf_counter()
        loaded.runtime.run(images)
        seconds.append(time.perf_counter() - start)
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
