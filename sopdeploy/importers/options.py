"""Options of `sopdeploy import`."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import Options

ImageSide = Annotated[int | None, pydantic.Field(ge=1)]


class ImportOptions(Options):
    """Class names and input size, which a weight file does not contain."""

    labels: Path | None = None
    """Class names in the order of the outputs: a .json list or text lines."""
    resize: ImageSide = None
    """Shorter side of the image in pixels."""
    crop: ImageSide = None
    """Side of the center crop in pixels."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation of the resize."""
