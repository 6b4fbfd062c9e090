"""Statistics and latency estimates of one model."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sopdeploy_service.inference.results import Outcome, Prediction, Rejection

SMOOTHING = 0.2  # weight of the newest batch in the moving average


@dataclass(slots=True)
class Sum:
    """A count and the total seconds."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more event that took *seconds*."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Sums over the requests of one model; used on the event loop only.

    *stages* sums over requests the slowest image of each stage; *batches* sums over images by the size of
    their batch. Requests rejected before they reach the model are not counted.
    """

    success: Sum = field(default_factory=Sum)
    failure: Sum = field(default_factory=Sum)
    stages: defaultdict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    batches: defaultdict[int, Sum] = field(default_factory=lambda: defaultdict(Sum))
    last: float = 0.0  # time.time() of the last successful request

    def record(
        self, result: Sequence[Outcome] | Rejection, stages: Mapping[str, float], seconds: float
    ) -> None:
        """Count a request with its *result*; one rejected image makes it a failure."""
        outcomes = [] if isinstance(result, Rejection) else result
        predictions = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
        for prediction in predictions:
            self.batches[prediction.batch].add(prediction.infer_seconds)
        if not predictions or len(predictions) < len(outcomes):
            self.failure.add(seconds)
            return
        self.last = time.time()
        self.success.add(seconds)
        for stage, spent in stages.items():
            self.stages[stage].add(spent)

    def executions(self) -> dict[int, Sum]:
        """Return the batches run, by size: the images of a batch share one run and its time."""
        return {
            size: Sum(round(images.count / size), images.seconds / size)
            for size, images in sorted(self.batches.items())
        }


class LatencyTable:
    """Moving average of the seconds of a batch, by its size."""

    def __init__(self, measured: Iterable[tuple[int, float]] = ()) -> None:
        """Start with *measured* pairs (images, seconds); the fastest of each size counts."""
        self._seconds: dict[int, float] = {}
        for images, seconds in measured:
            self._seconds[images] = min(seconds, self._seconds.get(images, seconds))

    def record(self, images: int, seconds: float) -> None:
        """Include a batch of *images* that took *seconds*."""
        old = self._seconds.get(images, seconds)
        self._seconds[images] = old + SMOOTHING * (seconds - old)

    def batch_seconds(self, images: int) -> float:
        """Estimate the seconds of one batch of *images*; 0 before the first measurement.

        A size without measurement takes the value of the next larger size, or scales the largest one.
        """
        known = self._seconds
        if images in known or not known:
            return known.get(images, 0.0)
        largest = max(known)
        if images > largest:
            return known[largest] * images / largest
        return known[min(size for size in known if size > images)]

    def total_seconds(self, images: int, max_batch: int) -> float:
        """Estimate the seconds of *images* in batches of at most *max_batch*."""
        full, rest = divmod(images, max_batch)
        return full * self.batch_seconds(max_batch) + (self.batch_seconds(rest) if rest else 0.0)
