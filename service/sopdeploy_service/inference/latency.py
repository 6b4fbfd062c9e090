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

    def record(self, num_images: int, seconds: float) -> None:
        """Include a batch of *num_images* that took *seconds*."""
        old = self._seconds.get(num_images, seconds)
        self._seconds[num_images] = old + SMOOTHING * (seconds - old)

    def batch_seconds(self, num_images: int) -> float:
        """Estimate the seconds of one batch of *num_images*; 0 before the first measurement.

        A size without measurement takes the value of the next larger size, or scales the largest one.
        """
        known = self._seconds
        if num_images in known or not known:
            return known.get(num_images, 0.0)
        largest = max(known)
        if num_images > largest:
            return known[largest] * num_images / largest
        return known[min(size for size in known if size > num_images)]

    def hang_seconds(self, num_images: int) -> float:
        """Compute after how many seconds a batch of *num_images* counts as hung."""
        return max(MIN_HANG_SECONDS, HANG_FACTOR * self.batch_seconds(num_images))

    def total_seconds(self, num_images: int, max_batch: int) -> float:
        """Estimate the seconds of *num_images* in batches of at most *max_batch*."""
        full, rest = divmod(num_images, max_batch)
        return full * self.batch_seconds(max_batch) + (self.batch_seconds(rest) if rest else 0.0)
