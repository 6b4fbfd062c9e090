"""How long work takes here: the median of recent work, beside what the same work is known to need.

A request waits for a decoder, is decoded, waits for a batch and runs in it. The header of an
image tells what it needs of a decoder, the warm-up what a batch needs. `Pace` tells how many
times as long the machine takes at present. Everything that is estimated for a request comes from
here: whether it is admitted, when it should be sent again, and what a decoder or a batch skips.

An estimate that is too high must not refuse the work that would correct it. Therefore a median
ignores a stall, such as a machine that was suspended. Without recent work, the usual pace counts.
And an image that is alone is never refused or skipped because of an estimate.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from sopdeploy_service.inference import results
from sopdeploy_service.inference.results import HttpError

NUM_RECENT = 15
MAX_AGE = 30.0  # seconds after the last work for which it counts
MAX_RETRY_SECONDS = 60
# Time that is left for an image that is admitted, in estimates of its time: of images that have just
# the median, half would be late.
MARGIN = 1.3


class _Recent(NamedTuple):
    """Medians of the recent work, and when its newest part ended."""

    factor: float
    seconds: float
    ended: float


class Pace:
    """How many times as long as known the recent work took. One thread records; every thread may read."""

    def __init__(self, usual: float = 1.0) -> None:
        """Take *usual* as the factor while there is no recent work."""
        self._usual = usual
        self._works: deque[tuple[float, float]] = deque(maxlen=NUM_RECENT)
        self._recent: _Recent | None = (
            None  # replaced as a whole, because other threads read it
        )

    def record(self, known: float, seconds: float) -> None:
        """Include work that is *known* to need so many seconds, and took *seconds*."""
        self._works.append((seconds / known, seconds))
        factors, took = zip(*self._works, strict=True)

        # The lower median: one of two works does not count if it was a stall.
        self._recent = _Recent(
            statistics.median_low(factors), statistics.median_low(took), time.monotonic()
        )

    @property
    def factor(self) -> float:
        """How many times as long as known work takes at present."""
        recent = self._current()
        return self._usual if recent is None else recent.factor

    @property
    def seconds(self) -> float:
        """The seconds of ordinary work at present; 0 without recent work."""
        recent = self._current()
        return 0.0 if recent is None else recent.seconds

    def _current(self) -> _Recent | None:
        """Return the medians of the recent work unless it is too old."""
        recent = self._recent
        is_current = recent is not None and time.monotonic() - recent.ended <= MAX_AGE
        return recent if is_current else None


class BatchPace:
    """The seconds of batches by their size, which a warm-up has measured, at the pace of recent batches."""

    def __init__(self, measured: Iterable[tuple[int, float]] = ()) -> None:
        """Start with *measured* pairs (images, seconds); the fastest of each size counts."""
        fastest: dict[int, float] = {}
        for images, seconds in measured:
            fastest[images] = min(seconds, fastest.get(images, seconds))
        self._measured = dict(sorted(fastest.items()))

        # Without a warm-up, an image counts as a second until batches have run.
        self._pace = Pace(usual=1.0 if fastest else 0.0)

    def measured(self) -> tuple[tuple[int, float], ...]:
        """Return (images, seconds) of each size, as the constructor takes them."""
        return tuple(self._measured.items())

    def record(self, num_images: int, seconds: float) -> None:
        """Include a batch of *num_images* that took *seconds*."""
        self._pace.record(self._known_seconds(num_images), seconds)

    def batch_seconds(self, num_images: int) -> float:
        """Estimate the seconds of one batch of *num_images*; 0 without warm-up and recent batches."""
        return self._known_seconds(num_images) * self._pace.factor

    def total_seconds(self, num_images: int, max_batch: int) -> float:
        """Estimate the seconds of *num_images* in batches of at most *max_batch*."""
        full, rest = divmod(num_images, max_batch)
        seconds = full * self.batch_seconds(max_batch)
        return seconds + self.batch_seconds(rest) if rest else seconds

    def _known_seconds(self, num_images: int) -> float:
        """Return the measured seconds of *num_images*, between or in proportion to those of other sizes."""
        smaller, below = 0, 0.0
        for size, seconds in self._measured.items():
            if size >= num_images:
                # A batch of one image is the smallest that was measured, if any smaller one was.
                share = (num_images - smaller) / (size - smaller) if smaller else 1.0
                return max(below + share * (seconds - below), 1e-6)
            smaller, below = size, seconds

        return max(below * num_images / smaller, 1e-6) if smaller else float(num_images)


def check_time(seconds: float, deadline: float) -> HttpError | None:
    """Return why an image that takes about *seconds* is refused; None if it is ready before *deadline*."""
    late = time.monotonic() + MARGIN * seconds - deadline
    return retry_after(results.TOO_LATE, late) if late > 0 else None


def retry_after(reason: HttpError, seconds: float) -> HttpError:
    """Return *reason* with the advice to send the request again when *seconds* have passed."""
    return replace(reason, retry_after=min(MAX_RETRY_SECONDS, max(1, math.ceil(seconds))))
