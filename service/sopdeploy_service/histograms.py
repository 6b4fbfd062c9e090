"""Histograms that cost a request next to nothing: what was observed is kept, and counted in bulk later.

In a library's histogram every observation looks for its bucket and takes two locks, five times for an image.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

MOST = 1024  # observations that are kept before they are counted, of each histogram


class Histograms(Collector):
    """The metric *name*, described by *what*: a histogram for each value of one *label*. Thread-safe.

    *bounds* are the upper ends of its buckets, ascending; a bucket holds what is equal to its end.
    """

    def __init__(self, name: str, what: str, bounds: Sequence[float], label: str) -> None:
        self._name, self._what, self.label = name, what, label
        self._bounds = (*map(float, bounds), float("inf"))
        self._kept: defaultdict[str, deque[float]] = defaultdict(deque)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()

    def open(self, value: str) -> None:
        """Let the histogram of *value* be shown, also before the first observation."""
        self._kept[value]

    def observe(self, value: str, amount: float) -> None:
        """Count *amount* in the histogram of *value*."""
        kept = self._kept[value]
        kept.append(amount)
        if len(kept) >= MOST:
            with self._counting:
                self._count(value)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Return the metric without a number."""
        return [HistogramMetricFamily(self._name, self._what, labels=(self.label,))]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the metric as it stands now."""
        (family,) = self.describe()
        with self._counting:
            for value in list(self._kept):
                totals = self._count(value).cumsum().tolist()
                ends = map(floatToGoString, self._bounds)
                family.add_metric((value,), list(zip(ends, totals, strict=True)), self._sums[value])
        return [family]

    def _count(self, value: str) -> NDArray[np.int64]:
        """Count what is kept for *value* and return how many each of its buckets holds."""
        kept = self._kept[value]
        amounts = np.array([kept.popleft() for _ in range(len(kept))], np.float64)
        counts = self._counts.setdefault(value, np.zeros(len(self._bounds), np.int64))
        counts += np.bincount(np.searchsorted(self._bounds, amounts), minlength=len(self._bounds))
        self._sums[value] += float(amounts.sum())
        return counts
