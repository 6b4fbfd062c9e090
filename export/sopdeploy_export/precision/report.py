"""The report on types and accuracy."""

from collections import Counter

from sopdeploy.bundle.manifest import Int8For, Precision
from sopdeploy.config import StrictModel
from sopdeploy_export.options import Calibration, Iteration


class PartPrecision(StrictModel):
    """Floating-point types of one part of the network in the exported file.

    `weights` is the type of its weights, None if it has none. `operations` maps each result type to the
    number of operations.
    """

    part: str
    weights: str | None
    operations: dict[str, int]


class Attempt(StrictModel):
    """One choice of ranges and float32 layers that was tried for int8.

    Attributes:
        calibration: Method that found the ranges.
        in_float32: Layers that stay in float32, in addition to those of `--keep-float`.
        drop: Lost points of top-1, or of agreement without labels.
    """

    calibration: Calibration
    in_float32: tuple[str, ...] = ()
    drop: float

    def __str__(self) -> str:
        """Describe the attempt in a few words."""
        count = len(self.in_float32)
        kept = f" with {count} layers in float32" if count else ""
        return f"{self.calibration}{kept} {self.drop:.2f}"


class Quantization(StrictModel):
    """The quantization to int8: method and calibration data.

    Attributes:
        runtime: The runtime that the graph is quantized for.
        kept: Parts that `--keep-float` keeps in float32.
        in_float32: Layers that stay in float32 because the accuracy dropped too much with int8 in all layers.
        calibration: Method that found the ranges.
        images: Number of calibration images.
        layers: Number of parts with int8 convolutions.
        tried: All attempts, in the order in which they were measured.
    """

    runtime: Int8For
    kept: tuple[str, ...]
    in_float32: tuple[str, ...] = ()
    calibration: Calibration
    images: int
    layers: int
    tried: tuple[Attempt, ...] = ()


class Accuracy(StrictModel):
    """The float32 graph compared with the exported one on the same images.

    Attributes:
        images: Number of images.
        before: Top-1 of the float32 graph as a fraction; `None` without labels.
        after: Top-1 of the exported graph as a fraction; `None` without labels.
        agree: Number of images with the same top class.
        low: Lower end of the 95 % confidence interval of the fraction that agrees.
        high: Upper end of that interval.
        drop: Lost points of top-1; without labels the percentage of images that disagree, an upper bound.
    """

    images: int
    before: float | None
    after: float | None
    agree: int
    low: float
    high: float
    drop: float


class PrecisionReport(StrictModel):
    """The content of `precision.json`."""

    precision: Precision
    newton_schulz: Iteration
    parts: tuple[PartPrecision, ...]
    quantisation: Quantization | None = None
    accuracy: Accuracy | None = None

    def summary(self) -> dict[str, int]:
        """Count the parts by the type of their weights."""
        return dict(sorted(Counter(part.weights for part in self.parts if part.weights).items()))
