"""Convert a path, bytes, PIL image or numpy array to the bytes of an image file."""

import io
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import ConfigError, DataError

ImageLike: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]


def encode_image(image: ImageLike) -> bytes:
    """Encode *image* as the bytes of an image file.

    Files and bytes are sent unchanged. PIL images and uint8 arrays (H, W, 3) or (H, W) are encoded as PNG,
    without loss. Raises `DataError` for an unreadable file and `ConfigError` for other types.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return read_file(Path(image))
    if isinstance(image, np.ndarray):
        gray_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not gray_or_rgb or 0 in image.shape:
            raise ConfigError(
                f"an array of {image.dtype} {image.shape} is not an image; use (H, W, 3) or (H, W) uint8"
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise ConfigError(
            f"{type(image).__name__} is not an image; use a path, bytes, a PIL image or an array"
        )
    file = io.BytesIO()
    try:
        image.save(file, "PNG", compress_level=1)  # speed matters more than size
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a {image.mode} image cannot be saved as PNG ({error}); convert it to RGB"
        ) from error
    return file.getvalue()


def read_file(path: Path) -> bytes:
    """Read the bytes of the file at *path*; raise `DataError` on failure."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
