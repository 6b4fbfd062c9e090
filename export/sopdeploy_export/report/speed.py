"""Measure the speed of the exported file against the plain backbone, converted without rewrites.

Only on request, because timings differ between runs and would make bundles differ. Both graphs run in turn,
in alternating order, so that other load slows both; the result is the median of the warm runs.
"""

import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.environment import machine
from sopdeploy_export.parity.session import open_session

WARMUPS, MIN_RUNS, MAX_RUNS = 2, 5, 200
BUDGET_SECONDS = 1.0  # of timed runs per batch size
LARGEST_BATCH = 32


class SpeedRow(StrictModel):
    """Median milliseconds of `runs` runs with `batch` images, of the exported file and the plain graph."""

    batch: int
    runs: int
    ours_ms: float
    plain_ms: float

    @property
    def ratio(self) -> float:
        """The exported file's time divided by the plain graph's."""
        return self.ours_ms / self.plain_ms


class Speed(StrictModel):
    """The timings on one machine, by batch size."""

    runtime: str
    machine: dict[str, str | int | float]
    rows: tuple[SpeedRow, ...]


def measure_speed(path: Path, plain: onnx.ModelProto, images: NDArray[np.uint8], batch: BatchRange) -> Speed:
    """Time the file at *path* and the *plain* graph on *images* (P, H, W, 3), for batches of 1, 2, 4, ..."""
    sessions = (open_session(path), open_session(plain))
    name = sessions[0].get_inputs()[0].name, sessions[1].get_inputs()[0].name
    rows = []
    for power in range(min(batch.maximum, LARGEST_BATCH).bit_length()):
        size = 2**power
        pixels = images[np.arange(size) % len(images)]
        seconds: tuple[list[float], list[float]] = ([], [])
        sides = [(session, {name[i]: pixels}, seconds[i]) for i, session in enumerate(sessions)]
        for _ in range(WARMUPS):
            for session, feed, _taken in sides:
                session.run(None, feed)
        while len(seconds[0]) < MAX_RUNS and (
            len(seconds[0]) < MIN_RUNS or sum(map(sum, seconds)) < BUDGET_SECONDS
        ):
            sides.reverse()  # the second graph runs with the caches of the first
            for session, feed, taken in sides:
                start = time.perf_counter()
                session.run(None, feed)
                taken.append(time.perf_counter() - start)
        ours, other = (statistics.median(taken) * 1e3 for taken in seconds)
        rows.append(SpeedRow(batch=size, runs=len(seconds[0]), ours_ms=ours, plain_ms=other))
    return Speed(runtime=f"onnxruntime {ort.__version__}", machine=machine(), rows=tuple(rows))
