"""The measurements of `parity.json` (drift, noise floors, agreement, routing) and `precision.json` (types).

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

from sopdeploy.bundle.manifest import Int8For, Precision
from sopdeploy.config import StrictModel

PROVIDER = "CPUExecutionProvider"
LOGITS = "logits"
FlipCause = Literal["noise", "routing", "error"]
FLOORS = 16.0
FLOORS_BY_PRECISION: Mapping[Precision, float] = {
    "fp32": FLOORS,
    "fp16": 4.0,
    "int8": 4.0,
}


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
    gate is decided. `left_out` lists the images excluded from the drift and from the probes.
    """

    noise_floor: float
    tolerance: float
    num_undecided: int
    num_flips: int
    num_wrong: int
    left_out: tuple[int, ...] = ()


class ParityReport(StrictModel):
    """The comparison of the exported file with its network.

    `spread` is the largest range of a logit over the images. `flips` counts changed top classes by cause:
    `routing` for images that are excluded for their route, `noise` if the network's margin between the two
    classes is at most twice the tolerance, otherwise `error`.
    """

    precision: Precision = "fp32"
    runtime: str
    provider: str
    num_images: int
    floors_allowed: float = FLOORS
    outputs: dict[str, OutputParity]
    spread: float
    flips: dict[FlipCause, int]
    routing: RoutingParity | None = None
    operators: dict[str, int]
    file_bytes: int
    drift_allowed: bool

    @property
    def passed(self) -> bool:
        """Whether all outputs are within their limits."""
        return not self.drift_allowed

    @property
    def num_agreeing(self) -> int:
        """The number of images with the network's top class."""
        return self.num_images - sum(self.flips.values())

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


def count_flips(
    values: NDArray[Any], expected: NDArray[Any], tolerance: float, rerouted: NDArray[np.bool_]
) -> dict[FlipCause, int]:
    """Count the top classes that differ between logits *values* and *expected*, both (P, C), by cause.

    *rerouted* (P,) marks images whose gate chose other components.
    """
    network, file = expected.argmax(axis=1), values.argmax(axis=1)
    images = np.arange(len(expected))
    within = expected[images, network] - expected[images, file] <= 2 * tolerance
    by_cause: dict[FlipCause, NDArray[np.bool_]] = {
        "noise": within & ~rerouted,
        "routing": rerouted,
        "error": ~within & ~rerouted,
    }
    return {cause: int((mask & (network != file)).sum()) for cause, mask in by_cause.items()}


class Attempt(StrictModel):
    """One choice of float32 layers that was tried for int8.

    Attributes:
        in_float32: Layers that stay in float32.
        drop: Lost points of top-1, or of agreement without labels.
    """

    in_float32: tuple[str, ...] = ()
    drop: float

    def __str__(self) -> str:
        """Describe the attempt in a few words."""
        return f"{len(self.in_float32) or 'no'} layers in float32 {self.drop:.2f}"


class Quantization(StrictModel):
    """The quantization to int8.

    Attributes:
        runtime: The runtime that the graph is quantized for.
        in_float32: Layers that stay in float32 because the accuracy dropped too much with int8 in all layers.
        num_images: Number of calibration images.
        num_layers: Number of parts with int8 convolutions.
        tried: All attempts, in the order in which they were measured.
    """

    runtime: Int8For
    in_float32: tuple[str, ...] = ()
    num_images: int
    num_layers: int
    tried: tuple[Attempt, ...] = ()


class Accuracy(StrictModel):
    """The float32 graph compared with the exported one on the same images.

    Attributes:
        num_images: Number of images.
        before: Top-1 of the float32 graph as a fraction; `None` without labels.
        after: Top-1 of the exported graph as a fraction; `None` without labels.
        num_agreeing: Number of images with the same top class.
        low: Lower end of the 95 % confidence interval of the fraction that agrees.
        high: Upper end of that interval.
        drop: Lost points of top-1; without labels the percentage of images that disagree, an upper bound.
    """

    num_images: int
    before: float | None
    after: float | None
    num_agreeing: int
    low: float
    high: float
    drop: float


class PrecisionReport(StrictModel):
    """The content of `precision.json`; `parts` has the type of the weights of each part that has any."""

    precision: Precision
    parts: dict[str, str]
    quantisation: Quantization | None = None
    accuracy: Accuracy | None = None
