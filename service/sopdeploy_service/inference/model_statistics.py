"""What one model has done since it was loaded: the sums behind the protocol's statistics."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sopdeploy_service.inference.results import Outcome, Prediction, Rejection


@dataclass(slots=True)
class Sum:
    """How often something was done, and the seconds it took all together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count it *count* times more."""
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Written and read on the event loop only.

    *stages* are sums over requests (of the images of a request the slowest counts), *batches* over images by
    the size of the batch they were in. Requests refused before they came to the model are not in here.
    """

    success: Sum = field(default_factory=Sum)
    failure: Sum = field(default_factory=Sum)
    stages: defaultdict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    batches: defaultdict[int, Sum] = field(default_factory=lambda: defaultdict(Sum))
    last: float = 0.0  # time.time() of the last answer

    def note(self, found: Sequence[Outcome] | Rejection, stages: Mapping[str, float], seconds: float) -> None:
        """Count a request that became *found* in so many *seconds*; one refused image makes it a failure."""
        outcomes = [] if isinstance(found, Rejection) else found
        answered = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
        for outcome in answered:
            self.batches[outcome.batch].add(outcome.infer_seconds)
        if not answered or len(answered) < len(outcomes):
            self.failure.add(seconds)
            return
        self.last = time.time()
        self.success.add(seconds)
        for stage, spent in stages.items():
            self.stages[stage].add(spent)

    def executions(self) -> dict[int, Sum]:
        """Return the runs of the engine by batch size: the images of a batch shared one run and its time."""
        return {
            size: Sum(round(images.count / size), images.seconds / size)
            for size, images in sorted(self.batches.items())
        }


SMOOTHING = 0.2  # share of the newest batch


class LatencyTable:
    """Seconds of a batch by its size."""

    def __init__(self, measured: Iterable[tuple[int, float]] = ()) -> None:
        """Begin with *measured* pairs (images, seconds); of several for one size the fastest counts."""
        self._seconds: dict[int, float] = {}
        for images, seconds in measured:
            self._seconds[images] = min(seconds, self._seconds.get(images, seconds))

    def note(self, images: int, seconds: float) -> None:
        """Take in a batch of *images* that took *seconds*."""
        old = self._seconds.get(images, seconds)
        self._seconds[images] = old + SMOOTHING * (seconds - old)

    def batch(self, images: int) -> float:
        """Return the seconds of one batch of *images*; 0 where nothing was measured.

        A size that was never seen is taken from the nearest larger one, else in proportion to the largest.
        """
        known = self._seconds
        if images in known:
            return known[images]
        if not known:
            return 0.0
        larger = [size for size in known if size >= images]
        if larger:
            return known[min(larger)]
        largest = max(known)
        return known[largest] * images / largest

    def queue(self, images: int, largest: int) -> float:
        """Return the seconds that *images* take in batches of at most *largest*."""
        full, rest = divmod(images, largest)
        return full * self.batch(largest) + (self.batch(rest) if rest else 0.0)
