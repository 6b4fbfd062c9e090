"""What a comparison of the shipped file with its network measured, as `parity.json` holds it.

The yardstick is measured, not guessed. The network runs in float64; the noise floor of an output is how far
the network's own run in the precision that ships is from that. The file may drift by `FLOORS` floors: 16 in
float32, where kernels and folded batch norms reorder sums and take 1 to 4; 4 in a reduced precision, where
the floor is the rounding itself and another kernel can only round again.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import Precision
from sopdeploy.config import StrictModel
from sopdeploy.evaluation.statistics import wilson

PROVIDER = "CPUExecutionProvider"
LOGITS = "logits"
GATES = "gates"
FLOORS = 16.0
FLOORS_BY_PRECISION: Mapping[Precision, float] = {
    "fp32": FLOORS,
    "fp16": 4.0,
    "bf16-backbone": 4.0,
    "int8": 4.0,
}


class Flip(StrictModel):
    """A probe image whose top class is another: class numbers, and the network's margin between them."""

    image: int
    network: int
    file: int
    margin: float
    because: Literal["noise", "routing", "error"]


class Agreement(StrictModel):
    """How often the top class is the network's.

    A flip counts as noise where the network's own margin between the two is below twice the tolerance, as
    routing where the gate chose other components (and was unsure). `low` and `high` bound the true share of
    agreement: Wilson's interval at 95 %. `flipped` lists the flips one by one.
    """

    images: int
    agree: int
    flips_within_noise: int
    flips_by_routing: int = 0
    flips: int
    flipped: tuple[Flip, ...] = ()
    low: float
    high: float


class OutputParity(StrictModel):
    """What was measured on one output of the shipped file, in the units of that output.

    `drift` is the largest difference from the network in float64 by batch size, `alone_or_in_batch` the
    largest difference that an image's company makes.
    """

    noise_floor: float
    tolerance: float
    drift: dict[str, float]
    alone_or_in_batch: float

    @property
    def largest_drift(self) -> float:
        """Return the largest drift over all batch sizes."""
        return max(self.drift.values())

    @property
    def drift_in_floors(self) -> float:
        """Return the largest drift in multiples of the noise floor."""
        return self.largest_drift / self.noise_floor

    @property
    def within_tolerance(self) -> bool:
        """Say whether neither drift nor company moves the output by more than its tolerance."""
        return max(self.largest_drift, self.alone_or_in_batch) <= self.tolerance


class RoutingParity(StrictModel):
    """How the gate of the shipped file chose, against the network in float64.

    An image is `unsteady` where the margin between the K-th and the next logit of the gate is within twice
    what those logits may drift, `tolerance`. Other components for such an image are a routing flip, for a
    steady image they are wrong. Unsteady images, or where all are unsteady those that took other routes, are
    `left_out` of the drift and of the probes. `usage` says of each component how many images chose it in
    float64.
    """

    noise_floor: float
    tolerance: float
    smallest_margin: float
    unsteady: int
    flips: int
    wrong: int
    left_out: tuple[int, ...] = ()
    usage: tuple[int, ...] = ()


class PartDrift(StrictModel):
    """How far the file is off where a part ends, and the noise floor there, in the units of that value.

    `share` is the root mean square of what it is off by, over the standard deviation of the value.
    """

    part: str
    drift: float
    noise_floor: float
    share: float

    @property
    def in_floors(self) -> float:
        """Return the drift in multiples of the noise floor."""
        return self.drift / self.noise_floor


class SpectralRecord(StrictModel):
    """What must hold of one second-order part whatever the picture, measured in torch.

    `asymmetry` is the largest ||R - R^T|| / ||R|| of its root, `residual` the largest ||R R - S|| / ||S||
    from its covariance S of `width` channels, `residual_exact` the same in float64: the distance that N
    steps leave by design. `distance` is the largest ||R - R*|| / ||R*|| from N steps in float64, which may
    be `allowed`; bounds for the others follow from it. `stored` is the type of matrices between products.
    """

    part: str
    width: int
    iterations: int
    stored: Literal["float32", "float16"]
    asymmetry: float
    residual: float
    residual_exact: float
    distance: float
    allowed: float


class ParityReport(StrictModel):
    """What was measured on the shipped file.

    `spread` is the largest range of a logit over the images, in a reduced precision; a file that ignores the
    picture is off by half of it somewhere. `emulation` says how the runtime computed what it has no kernels
    for; absent, it ran the file as it is.
    `broken` names the first invariant of `spectral` that does not hold.
    """

    precision: Precision = "fp32"
    runtime: str
    provider: str
    emulation: str | None = None
    images: int
    floors_allowed: float = FLOORS
    outputs: dict[str, OutputParity]
    spread: float | None = None
    top1: Agreement
    routing: RoutingParity | None = None
    parts: tuple[PartDrift, ...] = ()
    spectral: tuple[SpectralRecord, ...] = ()
    broken: str | None = None
    first_over_floor: str | None = None
    operators: dict[str, int]
    file_bytes: int
    passed: bool
    drift_allowed: bool

    @property
    def vacuous(self) -> bool:
        """Say whether a file that ignores the picture could be within tolerance, by noise alone.

        In int8 that is not asked of the probes, on one of which rounding may be far off: there agreement with
        float32 on the calibration pictures, or top-1 on labelled ones, is always measured and bounded.
        """
        judged = self.precision != "int8" and self.spread is not None
        return judged and self.logits.tolerance >= (self.spread or 0.0) / 2

    @property
    def compared_images(self) -> list[int]:
        """Return the images whose numbers were compared: all whose route is certain."""
        left_out = () if self.routing is None else self.routing.left_out
        return [image for image in range(self.images) if image not in left_out]

    @property
    def logits(self) -> OutputParity:
        """Return what was measured on the logits."""
        return self.outputs[LOGITS]


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
