"""`sopdeploy bench`: measure the latency of a bundle on this machine by batch size.

The probes are replayed first, so that a network with wrong outputs is never timed. Only the
network is timed: after a warm-up, in wall-clock time, on decoded images.
"""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sopdeploy.base.config import StrictModel
from sopdeploy.base.environment import installed, machine
from sopdeploy.cli.command import command
from sopdeploy.cli.console import say
from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.base import Runtime, translating_errors
from sopdeploy_service.settings import Settings, load_settings

WARMUP_RUNS = 3
MIN_RUNS = 10
MAX_RUNS = 1000
BUDGET_SECONDS = 2.0  # of timed runs of one bundle at one batch size
_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "sopdeploy", "tensorrt")
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


def _show(result: Benchmark) -> None:
    """Print the machine, and one line per batch size."""
    facts = {**result.machine, **result.versions}
    say(", ".join(f"{key} {value}" for key, value in facts.items()))
    say(f"{result.bundle} ({result.precision}) on {result.runtime}, {result.device}")
    for row in result.latencies:
        say(
            f"  batch {row.batch:<4} median {row.median_ms:9.2f} ms  p95 {row.p95_ms:9.2f}  "
            f"p99 {row.p99_ms:9.2f}  {row.images_per_s:10.1f} images/s  ({row.num_runs} runs)"
        )


@command(_show, examples=("sopdeploy bench bundles/photos-3f6c01d2a4b7 --batch 1,8",))
def bench(
    bundle: Path,
    *,
    batch: str = "1,8",
    settings: Settings | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure latency (median, p95, p99) and images per second of a bundle on this machine, after a warm-up.

    SOPDEPLOY_RUNTIME and SOPDEPLOY_THREADS select the runtime and its CPU threads, as for
    `serve`.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        batch: Batch sizes, separated by commas.
        settings: Settings of the service; by default from the environment.
        on_step: Called with the name of each step.
    """
    settings = settings or load_settings()
    batches = parse_batch_sizes(batch)

    # Sizes that the runtime does not take are an error before any measurement.
    on_step("opening the bundle and checking its reference outputs")
    loaded = load_model(bundle, settings)
    manifest = loaded.bundle.manifest
    runtime = loaded.runtime
    wrong = [size for size in batches if not 1 <= size <= runtime.largest_batch]
    if wrong:
        raise ConfigError(
            f"{loaded.bundle.name} takes batches of 1 to {runtime.largest_batch}, not of {wrong[0]}"
            "; choose sizes in this range"
        )

    latencies = []
    for size in batches:
        on_step(f"timing batches of {size}")
        latencies.append(time_batches(runtime, size, manifest.image_shape))

    return Benchmark(
        bundle=loaded.bundle.name,
        id=manifest.id,
        precision=manifest.precision,
        runtime=runtime.name,
        device=runtime.device,
        threads=settings.threads,
        machine=machine(),
        versions={"python": platform.python_version(), **installed(_PACKAGES)},
        latencies=tuple(latencies),
    )


def time_batches(runtime: Runtime, size: int, image_shape: tuple[int, int, int]) -> Latency:
    """Time batches of *size* noise images, which are as slow as photos; raises `RuntimeUnavailableError`."""
    images = np.random.default_rng(_SEED).integers(0, 256, (size, *image_shape), dtype=np.uint8)
    seconds: list[float] = []

    with translating_errors(runtime):  # a large batch may need more memory than there is
        for _ in range(WARMUP_RUNS):
            runtime.run(images)
        while len(seconds) < MIN_RUNS or (
            len(seconds) < MAX_RUNS and sum(seconds) < BUDGET_SECONDS
        ):
            start = time.perf_counter()
            runtime.run(images)
            seconds.append(time.perf_counter() - start)

    # Images per second follow from the median.
    median, p95, p99 = (1000 * float(value) for value in np.percentile(seconds, (50, 95, 99)))
    return Latency(
        batch=size,
        num_runs=len(seconds),
        median_ms=median,
        p95_ms=p95,
        p99_ms=p99,
        images_per_s=1000 * size / median,
    )


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Parse batch sizes such as "1,8", of up to 6 digits, without duplicates; raises `ConfigError`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 7 for word in words):
        raise ConfigError(
            "not a list of batch sizes; write it as 1,8", setting="batch", value=text
        )
    return tuple(dict.fromkeys(int(word) for word in words))
