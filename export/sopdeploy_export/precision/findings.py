"""The report on types and accuracy."""

from sopdeploy.bundle.manifest import Int8For, Precision
from sopdeploy.config import StrictModel


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
