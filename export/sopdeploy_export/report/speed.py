"""How fast the file that ships is on this machine, against the plain backbone written without any rule.

Only where it is asked for: what a clock says is another thing each time, and so is a bundle that holds it.
Both graphs are called in turn, each ahead of the other every second time, so that a busy machine slows
both; a figure is the median of the warm calls.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.environment import machine
from sopdeploy_export.parity.session import open_session

WARMUPS, FEWEST, MOST = 2, 5, 200
BUDGET_S = 1.0  # of timed calls for one batch size
LARGEST_BATCH = 32


class SpeedRow(StrictModel):
    """Medians of `runs` calls with `batch` images, in milliseconds: of what ships, and the plain graph."""

    batch: int
    runs: int
    ours_ms: float
    plain_ms: float

    @property
    def ratio(self) -> float:
        """Return ours over the plain graph's time: below 1 ours takes less."""
        return self.ours_ms / self.plain_ms


class Speed(StrictModel):
    """What the clock said on one machine, batch size by batch size."""

    runtime: str
    machine: dict[str, str | int | float]
    rows: tuple[SpeedRow, ...]


def measure_speed(path: Path, plain: onnx.ModelProto, images: NDArray[np.uint8], batch: BatchRange) -> Speed:
    """Return how long the file at *path* and the *plain* graph take for *images* (P, H, W, 3), repeated."""
    sessions = (open_session(path), open_session(plain))
    rows = []
    for size in sizes(batch):
        pictures = images[np.arange(size) % len(images)]
        ours, other = timed(sessions, pictures)
        rows.append(
            SpeedRow(
                batch=size,
                runs=len(ours),
                ours_ms=statistics.median(ours) * 1e3,
                plain_ms=statistics.median(other) * 1e3,
            )
        )
    return Speed(runtime=f"onnxruntime {ort.__version__}", machine=machine(), rows=tuple(rows))


def sizes(batch: BatchRange) -> list[int]:
    """Return the batch sizes that are timed: 1, 2, 4 and so on."""
    largest = min(batch.maximum, LARGEST_BATCH)
    return [2**power for power in range(largest.bit_length())]


def timed(sessions: tuple[Any, Any], pictures: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Return the seconds of warm calls of both *sessions*, made in turn, for as long as the budget lasts."""
    seconds: tuple[list[float], list[float]] = ([], [])
    feeds = [{session.get_inputs()[0].name: pictures} for session in sessions]
    for _ in range(WARMUPS):
        for session, feed in zip(sessions, feeds, strict=True):
            session.run(None, feed)
    sides = list(zip(sessions, feeds, seconds, strict=True))
    while len(seconds[0]) < MOST and (len(seconds[0]) < FEWEST or sum(map(sum, seconds)) < BUDGET_S):
        sides.reverse()  # whoever goes second meets what the first one left behind
        for session, feed, taken in sides:
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - start)
    return seconds
