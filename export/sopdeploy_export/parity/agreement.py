"""Is the first answer the same: counted, with an interval, and flips told apart by who was unsure."""

from collections import Counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sopdeploy.statistics import wilson
from sopdeploy_export.parity.report import Agreement, Flip


def agreement(
    values: NDArray[Any],
    expected: NDArray[Any],
    tolerance: float,
    rerouted: NDArray[np.bool_] | None = None,
) -> Agreement:
    """Return how often the top class agrees; flips it was unsure of are counted apart."""
    rows = np.arange(len(expected))
    theirs, ours = expected.argmax(axis=1), values.argmax(axis=1)
    margin = expected[rows, theirs] - expected[rows, ours]
    flipped = theirs != ours
    other_route = np.zeros(len(expected), dtype=bool) if rerouted is None else rerouted
    agree = int((~flipped).sum())
    low, high = wilson(agree, len(expected))
    found = tuple(
        Flip(
            image=int(image),
            network=int(theirs[image]),
            file=int(ours[image]),
            margin=float(margin[image]),
            because=why(bool(other_route[image]), bool(margin[image] <= 2 * tolerance)),
        )
        for image in np.flatnonzero(flipped)
    )
    counts = Counter(flip.because for flip in found)
    return Agreement(
        images=len(expected),
        agree=agree,
        flips_within_noise=counts["noise"],
        flips_by_routing=counts["routing"],
        flips=counts["error"],
        flipped=found,
        low=low,
        high=high,
    )


def why(other_route: bool, unsure: bool) -> Literal["noise", "routing", "error"]:
    """Return what a flip is put down to."""
    if other_route:
        return "routing"
    return "noise" if unsure else "error"
