"""The measurements of `parity.json`: drift, noise floors, top-1 agreement and routing.

Tolerances are multiples of a measured noise floor. The reference is the network in float64. The noise floor
of an output is the distance between that reference and the network's own run in the exported precision. The
file may drift by `FLOORS_BY_PRECISION` noise floors: 16 in float32, where reordered sums and folded batch
norms cause 1 to 4; 4 in a reduced precision, where the floor already contains the rounding to that precision.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import Precision
from sopdeploy.config import StrictModel
from sopdeploy.evaluation.statistics import wilson

PROVIDER = "CPUExecutionProvider"
LOGITS = "logits"
FlipCause = Literal["noise", "routing", "error"]
FLOORS = 16.0
FLOORS_BY_PRECISION: Mapping[Precision, float] = {
    "fp32": FLOORS,
    "fp16": 4.0,
    "bf16-backbone": 4.0,
    "int8": 4.0,
}


class Flip(StrictModel):
    """A probe image whose top class changed, and the network's margin between the two classes.

    The cause is `noise` if the margin is at most twice the tolerance, `routing` if the image is excluded for
    its route, and otherwise `error`.
    """

    image: int
    network: int
    file: int
    margin: float
    cause: FlipCause


class Agreement(StrictModel):
    """Top-1 agreement between the file and the network.

    `low` and `high` are the 95 % Wilson interval of the agreement rate.
    """

    num_images: int
    num_agreeing: int
    flipped: tuple[Flip, ...] = ()
    low: float
    high: float

    def flips(self, cause: FlipCause) -> int:
        """Count the changed top classes with this *cause*."""
        return sum(flip.cause == cause for flip in self.flipped)


class OutputParity(StrictModel):
    """The drift of one output, in the units of that output.

    `drift` maps each batch size to the maximum absolute difference from the float64 network;
    `batch_difference` is the maximum change caused by batching.
    """

    noise_floor: float
    tolerance: float
    drift: dict[str, float]
    batch_difference: float

    @property
    def largest_drift(self) -> float:
        """The maximum drift over all batch sizes."""
        return max(self.drift.values())

    @property
    def largest_difference(self) -> float:
        """The larger of the maximum drift and the change caused by batching."""
        return max(self.largest_drift, self.batch_difference)

    @property
    def drift_in_floors(self) -> float:
        """The maximum drift in multiples of the noise floor."""
        if self.noise_floor == 0:  # the output does not depend on the image
            return math.inf if self.largest_drift else 0.0
        return self.largest_drift / self.noise_floor


class RoutingParity(StrictModel):
    """Comparison of the routes that the gate of the file chose with those of the float64 network.

    The gate is undecided on an image if the margin between its K-th and the next logit is at most twice
    `tolerance`, the allowed drift of these logits; `num_undecided` counts these images. `num_flips` counts
    those that the file routes to other components; `num_wrong` counts images that it routes so although the
    gate is decided. `left_out` lists the images excluded from the drift and from the probes. `usage` is the
    number of images per component in float64.
    """

    noise_floor: float
    tolerance: float
    num_undecided: int
    num_flips: int
    num_wrong: int
    left_out: tuple[int, ...] = ()
    usage: tuple[int, ...] = ()


class ParityReport(StrictModel):
    """The comparison of the exported file with its network.

    `spread` is the largest range of a logit over the images. `emulation` describes how the runtime computed
    operators for which it has no kernels; None if it ran the file unchanged.
    """

    precision: Precision = "fp32"
    runtime: str
    provider: str
    emulation: str | None = None
    num_images: int
    floors_allowed: float = FLOORS
    outputs: dict[str, OutputParity]
    spread: float
    top1: Agreement
    routing: RoutingParity | None = None
    operators: dict[str, int]
    file_bytes: int
    passed: bool
    drift_allowed: bool

    @property
    def unverifiable(self) -> bool:
        """Whether a file that ignores its input could be within the tolerance.

        Such a file is wrong by at least half of the spread. int8 is exempt: rounding may move a single probe
        far, and agreement with float32 is measured on the calibration or evaluation images instead.
        """
        return self.precision != "int8" and self.logits.tolerance >= self.spread / 2

    @property
    def compared_images(self) -> list[int]:
        """The indices of the images whose outputs were compared."""
        left_out = () if self.routing is None else self.routing.left_out
        return [image for image in range(self.num_images) if image not in left_out]

    @property
    def logits(self) -> OutputParity:
        """The drift of the logits."""
        return self.outputs[LOGITS]


def agreement(
    values: NDArray[Any], expected: NDArray[Any], tolerance: float, rerouted: NDArray[np.bool_]
) -> Agreement:
    """Compare the top classes of logits *values* and *expected*, both (P, C).

    *rerouted* (P,) marks images whose gate chose other components.
    """
    network, file = expected.argmax(axis=1), values.argmax(axis=1)
    flipped = []
    for image in np.flatnonzero(network != file).tolist():
        margin = float(expected[image, network[image]] - expected[image, file[image]])
        cause: FlipCause = "noise" if margin <= 2 * tolerance else "error"
        if rerouted[image]:
            cause = "routing"
        classes = {"network": int(network[image]), "file": int(file[image])}
        flipped.append(Flip(image=image, **classes, margin=margin, cause=cause))
    num_images, num_agreeing = len(expected), len(expected) - len(flipped)
    low, high = wilson(num_agreeing, num_images)
    return Agreement(
        num_images=num_images, num_agreeing=num_agreeing, flipped=tuple(flipped), low=low, high=high
    )
