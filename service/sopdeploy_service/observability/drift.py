"""Drift of the predictions of a served bundle, in windows of `WINDOW_IMAGES`.

Each window is tested once, when it is full, so the false-alarm rate of `sopdeploy.evaluation.drift` holds per
window. Testing all predictions since the start again at every scrape would raise more and more false alarms.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.decision import Reference
from sopdeploy.evaluation.drift import Drift, PredictionCounts

WINDOW_IMAGES = 1000


def drift_window(bundle: Bundle) -> "DriftWindow | None":
    """Create the window of *bundle*; None if it has no predictions for held-out images."""
    decision = bundle.manifest.decision
    if decision is None or decision.reference is None:
        return None
    return DriftWindow(decision.reference)


class DriftWindow:
    """Counts predictions, and compares every full window with the held-out ones. Not thread-safe."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._counts = PredictionCounts(len(reference.classes))
        self.latest: Drift | None = None  # of the last full window

    def add(self, logits: Sequence[NDArray[np.float32]]) -> None:
        """Count the predictions of images with *logits* (C,)."""
        if not logits:
            return
        self._counts.add_logits(np.stack(logits))
        if self._counts.images >= WINDOW_IMAGES:
            self.latest = self._counts.compare(self._reference)
            self._counts = PredictionCounts(len(self._reference.classes))
