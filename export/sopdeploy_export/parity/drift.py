"""How far a file is off at one boundary of a part: from exact values, and from what its own floor allows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy_export.parity.report import PartDrift


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """What a person calls `part` ends with the value that the file calls `value` and the graph `node`."""

    value: str
    node: str
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far the file is off at one boundary, and its floor there, both in the units of that value.

    `share` is the root mean square of the first over the standard deviation of the value.
    """

    part: str
    drift: float
    floor: float
    share: float

    @property
    def in_floors(self) -> float:
        """Return the drift in multiples of the floor; without end where it is not a number."""
        return self.drift / self.floor if np.isfinite(self.drift) else float("inf")


def drift_at(part: str, found: NDArray[Any], exact: NDArray[Any], own: NDArray[Any]) -> Drift:
    """Return how far *found* is off at *part* from *exact*, and the floor: how far its *own* run is."""
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
    smallest = 4 * float(np.finfo(np.float32).eps) * largest
    return Drift(
        part=part,
        drift=farthest(found, exact),
        floor=max(smallest, farthest(own, exact), 1e-30),
        share=share_of_spread(found, exact),
    )


def farthest(values: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the largest difference; an infinity in both, as a gate gives what it leaves out, is none."""
    return float(np.abs(difference(values, exact)).max(initial=0.0))


def share_of_spread(values: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the root mean square difference over the standard deviation of what is finite in *exact*."""
    spread = float(exact[np.isfinite(exact)].std()) or 1.0
    return float(np.sqrt(np.square(difference(values, exact)).mean())) / spread


def difference(values: NDArray[Any], exact: NDArray[Any]) -> NDArray[np.float64]:
    """Return *values* - *exact* in float64, 0 where they are equal."""
    same = values == exact
    found: NDArray[np.float64] = np.where(same, 0.0, values.astype(np.float64)) - np.where(same, 0.0, exact)
    return found


def finite(found: Iterable[Drift]) -> tuple[PartDrift, ...]:
    """Return what a report can say of *found*: all that is a number."""
    return tuple(
        PartDrift(part=place.part, drift=place.drift, noise_floor=place.floor, share=place.share)
        for place in found
        if np.isfinite(place.drift)
    )
