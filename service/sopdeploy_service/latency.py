"""How long a batch of n takes: measured by the replays at start, kept fresh by every batch since."""

from collections.abc import Iterable

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
