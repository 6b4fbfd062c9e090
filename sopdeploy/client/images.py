"""What a caller has to the bytes that are sent: a path, bytes, a PIL image or a numpy array."""

import io
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ConfigError, DataError

Picture: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]


def encoded(picture: Picture) -> bytes:
    """Return *picture* as the bytes of an image file.

    Files and bytes go as they are; a PIL image and an array (H, W, 3) or (H, W) uint8 become PNG, which
    loses nothing. Raises `DataError` where a file cannot be read, `ConfigError` for anything else.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return read(Path(picture))
    if isinstance(picture, np.ndarray):
        picture = from_array(picture)
    if not isinstance(picture, Image.Image):
        raise ConfigError(
            f"{type(picture).__name__} is no picture; give a path, bytes, a PIL image or an array"
        )
    file = io.BytesIO()
    try:
        picture.save(file, "PNG", compress_level=1)  # time matters more than bytes here
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"a {picture.mode} image has no PNG form ({problem}); convert it to RGB"
        ) from problem
    return file.getvalue()


def listed(pictures: Any) -> tuple[list[Picture], bool]:
    """Return *pictures* as a list, and whether it was one already."""
    several = isinstance(pictures, list | tuple)
    return (list(pictures) if several else [pictures]), several


def read(path: Path) -> bytes:
    """Return the bytes of the file at *path*; raises `DataError`."""
    try:
        return path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror})") from problem


def from_array(pixels: NDArray[Any]) -> Image.Image:
    """Return *pixels*, (H, W, 3) or (H, W) uint8, as an image; raises `ConfigError` for other arrays."""
    grey_or_rgb = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not grey_or_rgb or 0 in pixels.shape:
        raise ConfigError(
            f"an array of {pixels.dtype} {pixels.shape} is no picture; give (H, W, 3) or (H, W) of uint8"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
