"""From what a program calls an image to the bytes of an image file: for the client and for `predict`.

Files and bytes stay as they are. PIL images and arrays become PNG files that decode to what the
image's own file would: turned by its EXIF tag, with its transparency, its palette, its 16 bits.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from io import TextIOBase
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.base.files import MAX_IMAGE_BYTES, open_regular, read_at_most
from sopdeploy.errors import DataError, SopdeployError
from sopdeploy.images.formats import image_error, too_large_error
from sopdeploy.images.pixels import (
    ORIENTATION,
    SIXTEEN_BIT,
    UPRIGHT,
    correct_transparency_info,
    exif_orientation,
    frame_mask,
    to_rgba,
)
from sopdeploy.images.signatures import has_image_suffix

AnyImage: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.uint8]
)
Buffer = bytes | bytearray | memoryview
EXPECTED = "a path, bytes, a file, a PIL image, or a uint8 array (H, W, 3), (H, W, 4) or (H, W)"
# of PIL images: those of the accepted formats, and what PIL converts to RGB
MODES = {
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV",
} | SIXTEEN_BIT  # fmt: skip
PNG_MODES = {"1", "L", "RGB"}  # without alpha and 16 bits
COLORS = 3, 4  # lengths of the last axis of an array
MAX_NAME = 255  # bytes of the name of a file
BASE64 = re.compile(r"[A-Za-z0-9+/=_\s-]+")


def encode_image(
    image: object, *, limit: int = MAX_IMAGE_BYTES, compress_level: int = 1
) -> bytes:
    """Return the bytes of an image file, at most *limit* of a file or buffer.

    Raises `DataError` for a file that cannot be read and for what `check_is_image` refuses,
    and `ImageError` for a larger file and for a PIL image whose pixels cannot be decoded.
    """
    check_is_image(image)
    if isinstance(image, np.ndarray):
        if _has_file_shape(image):
            return _read(image.tobytes(), limit)
        return _to_png(Image.fromarray(np.ascontiguousarray(image)), compress_level)

    if isinstance(image, Image.Image):
        try:
            return _to_png(image, compress_level)
        except Exception as error:  # a decoder may raise anything
            raise image_error(error) from error

    return _read(image, limit)


def check_is_image(image: object) -> None:
    """Raise `DataError`, which says what *image* looks like, unless `encode_image` accepts it.

    Nothing is read from a file and nothing is decoded: `encode_image` can still find that a
    file is too large, or that pixels cannot be decoded.
    """
    if isinstance(image, str | os.PathLike):
        _check_path(os.fspath(image))
    elif isinstance(image, Image.Image):
        problem = _problem_of_picture(image)
        if problem:
            raise DataError(problem)
    elif isinstance(image, np.ndarray):
        problem = _problem_of_array(image)
        if problem:
            raise DataError(f"a {image.dtype} array {image.shape}: {problem}")
    elif not isinstance(image, Buffer) and not _is_binary_file(image):
        raise DataError(f"{_describe(image)}; give {EXPECTED}")


def name_image(image: object, number: int) -> str:
    """Name *image*, the one with *number* of its list, for messages: by its path, if it has one."""
    if isinstance(image, str | os.PathLike):
        return str(image)

    # The first is an attribute of what `Image.open` has opened, the second of a file.
    for name in (getattr(image, "filename", ""), getattr(image, "name", "")):
        if isinstance(name, str) and name:
            return name
    return f"image {number}"


@contextmanager
def naming(name: str, *kinds: type[SopdeployError]) -> Iterator[None]:
    """Raise errors of *kinds* as a `DataError` about the image *name*."""
    try:
        yield
    except kinds as error:
        raise DataError(f"{name}: {error}") from error


def _check_path(path: str | bytes) -> None:
    """Raise `DataError` unless *path* can be read, as far as that is known before it is read."""
    text = os.fsdecode(path)
    if not os.path.lexists(text.partition("\0")[0]):  # it raises for a NUL
        if "://" in text[:20]:
            raise DataError("looks like an address; download it, and give its bytes")
        if text.startswith("data:") or (len(text) > MAX_NAME and BASE64.fullmatch(text)):
            raise DataError("looks like base64; give base64.b64decode(...) of it")

    with _reading():
        # A pipe is not opened: what is read from it is gone. One with the ending of an image is
        # refused.
        is_other_file = Path(text).exists() and not Path(text).is_file()
        if has_image_suffix(text) or not is_other_file:
            open_path(text).close()


def open_path(path: str) -> IO[bytes]:
    """Open the image file *path*; with the ending of an image, it must be a regular file.

    `photos/*` can match a FIFO, on which reading may wait forever. Other paths, such as
    /dev/stdin or <(command), may be pipes.
    """
    return open_regular(path) if has_image_suffix(path) else Path(path).open("rb")


@contextmanager
def _reading() -> Iterator[None]:
    """Convert what a file raises when it is opened or read to `DataError`."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: no path, or a closed file
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read ({reason}); name an image file") from error


def _is_binary_file(image: object) -> bool:
    read = getattr(image, "read", None)
    return (
        callable(read)
        and not iscoroutinefunction(read)
        and not isinstance(image, TextIOBase | type)
    )


def _read(image: Any, limit: int) -> bytes:
    """Read a path, buffer or file *image*, which `check_is_image` has accepted.

    Raises `DataError` if it cannot be read, and `ImageError` for more than *limit* bytes.
    """
    if isinstance(image, Buffer):
        content = bytes(image)
    else:
        with _reading():
            if isinstance(image, str | os.PathLike):
                with open_path(os.fsdecode(image)) as file:
                    if os.fstat(file.fileno()).st_size > limit:
                        raise too_large_error(limit)
                    content = read_at_most(file, limit + 1)
            else:
                if image.seekable():  # as `Image.open` does
                    image.seek(0)
                content = read_at_most(image, limit + 1)

    if len(content) > limit:
        raise too_large_error(limit)
    return content


def _problem_of_picture(image: Image.Image) -> str:
    """Say why no file can hold what the PIL *image* shows; empty for others."""
    if 0 in image.size:
        return f"a PIL image without pixels {image.size}; give another"
    if image.mode not in MODES:
        return f"a PIL image of mode {image.mode}; scale it to 8 bits, and convert it to RGB"
    return ""


def _problem_of_array(array: NDArray[Any]) -> str:
    """Say what *array* looks like if it is not a uint8 array (H, W, 3), (H, W, 4) or (H, W); else nothing."""
    shape = array.shape

    if 0 in shape:
        return "has no pixels; give another"
    if array.ndim == 4:
        return "looks like a batch; give list(array)"
    if array.dtype == np.uint8 and _has_file_shape(array):
        return ""

    if array.ndim == 3 and shape[2] not in COLORS:
        if shape[0] in (1, *COLORS):
            return "looks like channels first; give np.moveaxis(array, 0, -1)"
        if shape[2] == 1:
            return "looks like gray with an axis more; give array[..., 0]"

    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in COLORS):
        return f"looks like no image; give {EXPECTED}"
    if array.dtype == np.uint8:
        return ""
    return _problem_of_values(array)


def _has_file_shape(array: NDArray[Any]) -> bool:
    """Tell whether *array* is the bytes of a file, (N,) or (N, 1), as OpenCV's `imencode` returns them."""
    return array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)


def _problem_of_values(array: NDArray[Any]) -> str:
    """Say how to make uint8 of *array*, whose shape is that of an image."""
    if array.dtype == np.bool_:
        return "looks like a mask; give array.astype(np.uint8) * 255"
    if array.dtype == np.uint16:
        return "looks like 16 bits; give (array // 257).astype(np.uint8)"
    if array.dtype.kind not in "iuf":
        return f"looks like no image; give {EXPECTED}"

    low = array.min()
    high = array.max()
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return "looks like colors from 0 to 1; give (array * 255).round().astype(np.uint8)"
    if low >= 0 and high <= 255:
        return "looks like colors from 0 to 255; give array.round().astype(np.uint8)"
    return "looks normalized; give the colors from 0 to 255 as uint8"


def _describe(image: object) -> str:
    """Say what *image*, which is not an image, looks like, and what to do."""
    if isinstance(image, list | tuple):
        return f"a {type(image).__name__} in a list; put all images into one list"
    if isinstance(image, TextIOBase):
        return "a file that was opened as text; open it with the mode 'rb'"
    if callable(getattr(image, "read", None)):
        return f"{type(image).__name__}, whose read() must be awaited"

    shape = getattr(image, "shape", None)
    if shape is not None:
        return f"{type(image).__name__} {tuple(shape)}, no NumPy array; convert it"
    return type(image).__name__


def _to_png(image: Image.Image, compress_level: int) -> bytes:
    """Encode *image* as a PNG without loss, with the tag that turns it."""
    correct_transparency_info(image)
    orientation = exif_orientation(image)
    image.load()
    transparency = None
    mask = frame_mask(image)

    # PNG has gray of 16 bits; everything else has 8 bits per channel.
    if image.mode in SIXTEEN_BIT:
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        picture = Image.fromarray(values)
        transparency = image.info.get("transparency")  # a level of gray
    elif image.has_transparency_data or mask is not None:
        picture = to_rgba(image)
    else:
        picture = image if image.mode in PNG_MODES else image.convert("RGB")

    # A frame that covers a part of its canvas shows nothing elsewhere.
    if mask is not None:
        picture.putalpha(mask)

    exif = Image.Exif()
    if orientation != UPRIGHT:
        exif[ORIENTATION] = orientation

    file = io.BytesIO()
    picture.save(
        file, "PNG", compress_level=compress_level,
        exif=exif, icc_profile=None, transparency=transparency,
    )  # fmt: skip
    return file.getvalue()
