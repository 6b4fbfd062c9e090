"""Estimates of how long batches take, from the batches so far."""

from collections.abc import Iterable

MIN_HANG_SECONDS = 4.0  # tolerates a clock that jumps and a machine that stalls
HANG_FACTOR = 20  # a batch counts as hung after this many times its usual seconds
SMOOTHING = 0.2  # weight of the newest batch in the moving average


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

    def hang_seconds(self, images: int) -> float:
        """Compute after how many seconds a batch of *images* counts as hung."""
        return max(MIN_HANG_SECONDS, HANG_FACTOR * self.batch_seconds(images))

    def total_seconds(self, images: int, max_batch: int) -> float:
        """Estimate the seconds of *images* in batches of at most *max_batch*."""
        full, rest = divmod(images, max_batch)
        return full * self.batch_seconds(max_batch) + (self.batch_seconds(rest) if rest else 0.0)
