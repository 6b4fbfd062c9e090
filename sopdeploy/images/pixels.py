"""Apply the rules of `Preprocess` to a decoded image: rotate, convert to RGB, resize and crop.

Color conversions with intermediate results run in tiles. On the whole image they would need six
times the memory of the RGB image, and a PNG of 100 kB can have 50 megapixels.

The orientation is read from the EXIF data without the other tags. Pillow reads all tags, and
they may overlap: 5400 tags of 64 kB each fit into 64 kB and would take 350 MB.
"""

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.images.fast_resize import fast_resize
from sopdeploy.images.preprocess import Box, Pixels, Preprocess
from sopdeploy.images.resize import resize_by_rules

ORIENTATION = 0x0112
UPRIGHT = 1
INTEGERS = {1: "B", 3: "H", 4: "I"}  # formats of `struct` by the type of a tag
TEXT_PROFILE = "Raw profile type exif"  # in the text of a PNG
XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
MAX_ASPECT_RATIO = 16  # of a longer strip, only the cropped part is resized
TURNS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
), strict=True))  # fmt: skip
# Orientations of EXIF
MIRRORED_X = {2, 3, 6, 7}
MIRRORED_Y = {3, 4, 7, 8}
TRANSPOSED = {5, 6, 7, 8}
SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L"}
TILE = 2**16  # pixels
# 8-bit levels between the gray values of PNGs of 2 and 4 bits
GRAY_STEPS = {"L;2": 85, "L;4": 17}
# In `info` of a GIF whose first frame covers only this box of the canvas
FRAME_BOX = "sopdeploy_frame"


def exif_orientation(image: Image.Image) -> int:
    """Read the orientation of *image*, 1 to 8, from EXIF, else from XMP; 1 (upright) if absent or invalid.

    The pixels of a PNG are loaded, because its tags may follow them. A PNG can also have EXIF
    as text: an empty line, a name, a length and lines of hexadecimal digits.
    """
    try:
        if image.format == "PNG" and "exif" not in image.info:
            image.load()
        info: dict[Any, Any] = image.info

        exif = info.get("exif")
        if exif is None and TEXT_PROFILE in info:
            hexadecimal_lines = info[TEXT_PROFILE].split("\n")[3:]
            exif = bytes.fromhex("".join(hexadecimal_lines))
        orientation = _read_orientation(exif) if exif else None

        if orientation is None:  # EXIF does not tell it
            xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
            match = XMP.search(xmp if isinstance(xmp, bytes) else xmp.encode())
            orientation = int(match[1]) if match else UPRIGHT
    except Exception:  # damaged tags fail in many ways
        return UPRIGHT

    return orientation if orientation in TURNS else UPRIGHT


def _read_orientation(data: bytes) -> int | None:
    """Read the orientation in the first directory of *data*; None if absent, `KeyError` if no integer."""
    data = data.removeprefix(b"Exif\0\0")
    order = "<" if data.startswith(b"II") else ">"
    with suppress(struct.error):  # the data are cut
        (start,) = struct.unpack_from(order + "I", data, 4)  # of the directory
        (count,) = struct.unpack_from(order + "H", data, start)

        # Each entry has 12 bytes: tag, type, number of values, and the value if it fits.
        for number in range(count):
            tag, type_code, _, value = struct.unpack_from(
                order + "HHI4s", data, start + 2 + 12 * number
            )
            if tag == ORIENTATION:  # the value is in the first 1, 2 or 4 of the bytes
                return int(struct.unpack_from(order + INTEGERS[type_code], value)[0])
    return None


class View(NamedTuple):
    """The `box` of an upright image, in its pixels, that is resized to `size`, (width, height)."""

    box: Box
    size: tuple[int, int]

    @property
    def scale(self) -> int:
        """The largest of 8, 4, 2 and 1 by which the box can be reduced and still be twice as large as `size`.

        It is 1 for a smaller box, too.
        """
        left, top, right, bottom = self.box
        ratio = min((right - left) / self.size[0], (bottom - top) / self.size[1])
        return next(scale for scale in (8, 4, 2, 1) if ratio >= 2 * scale or scale == 1)


ChooseView = Callable[[tuple[int, int]], View]  # by the size of the upright image


def preprocess_image(
    image: Image.Image,
    rules: Preprocess,
    view: View | None = None,
    size: tuple[int, int] | None = None,
    scale: int = 1,
) -> Pixels:
    """Convert *image* to upright RGB and fit it to the network; returns (crop, crop, 3) uint8.

    A *view* replaces that of *rules*. If *image* was decoded at 1/*scale*, *size* is that of
    the whole image, upright; *rules* with the decoding "full" do not allow it.
    """
    if rules.decoding != "full":
        fitted = _resize_box(image, rules, view, size, scale)
    else:
        rgb = to_rgb(image, rules)
        if view is not None:
            fitted = resize_by_rules(rgb, view.size, rules, view.box)
        elif rules.fit == "pad":
            fitted = resize_by_rules(rgb, resized_size(rgb.size, rules), rules)
        else:
            return center_crop(rgb, rules)

    # A padded image is in the middle of the background.
    if rules.fit != "pad":
        return np.asarray(fitted)
    canvas = Image.new("RGB", (rules.crop, rules.crop), rules.background)
    left, top = (round((rules.crop - side) / 2) for side in fitted.size)
    canvas.paste(fitted, (left, top))
    return np.asarray(canvas)


def _resize_box(
    image: Image.Image,
    rules: Preprocess,
    view: View | None,
    size: tuple[int, int] | None,
    scale: int,
) -> Image.Image:
    """Resize the box of *view* in *image*, then turn it; the arguments are those of `preprocess_image`."""
    orientation = exif_orientation(image) if rules.exif_orientation else UPRIGHT
    width, height = size or turned_size(image.size, orientation)
    (left, top, right, bottom), new_size = view or center_view((width, height), rules)

    # The box in the stored image, which the camera may have turned or mirrored.
    if orientation in MIRRORED_X:
        left, right = width - right, width - left
    if orientation in MIRRORED_Y:
        top, bottom = height - bottom, height - top
    if orientation in TRANSPOSED:
        left, top, right, bottom = top, left, bottom, right

    box = (
        left / scale,
        top / scale,
        min(image.width, right / scale),
        min(image.height, bottom / scale),
    )

    rgb = to_rgb(image, rules, UPRIGHT)
    stored_size = turned_size(new_size, orientation)
    if rules.decoding == "fast":
        fitted = fast_resize(rgb, stored_size, rules.interpolation, box)
    else:
        fitted = resize_by_rules(rgb, stored_size, rules, box)
    return fitted.transpose(TURNS[orientation]) if orientation != UPRIGHT else fitted


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the (width, height) of an image of *size* after or before it is turned by *orientation*."""
    return (size[1], size[0]) if orientation in TRANSPOSED else size


def resized_size(size: tuple[int, int], rules: Preprocess) -> tuple[int, int]:
    """Compute (width, height) that an image of *size* is resized to before it is cropped or padded."""
    if rules.fit == "squash":
        return rules.crop, rules.crop
    if rules.fit == "squash-crop":
        return rules.resize, rules.resize

    shorter = min(size)
    longer = max(size)

    if rules.fit == "pad":  # rounded as by timm's `ResizeKeepRatio`
        new_shorter = max(1, round(rules.crop * shorter / longer))
        new_longer = rules.crop
    else:  # cut off as by torchvision's `Resize`
        new_shorter = rules.resize
        new_longer = max(1, int(rules.resize * longer / shorter))

    return (new_shorter, new_longer) if size[0] <= size[1] else (new_longer, new_shorter)


def to_rgb(
    image: Image.Image, rules: Preprocess, orientation: int | None = None
) -> Image.Image:
    """Rotate *image* upright, convert it to RGB and composite it onto the background.

    Its *orientation* is by default that of EXIF, or upright if *rules* do not apply it. 16-bit
    gray is scaled to 8 bits, because Pillow clips it to white. An upright RGB image is returned
    itself, not copied.
    """
    image.load()
    frame_alpha = frame_mask(image)
    if orientation is None:
        orientation = exif_orientation(image) if rules.exif_orientation else UPRIGHT

    # Turn the image, and the mask with it.
    if orientation != UPRIGHT:
        image = image.transpose(TURNS[orientation])
        if frame_alpha is not None:
            frame_alpha = frame_alpha.transpose(TURNS[orientation])
    is_opaque = not image.has_transparency_data and frame_alpha is None
    if is_opaque and image.mode not in SIXTEEN_BIT:
        return image if image.mode == "RGB" else image.convert("RGB")

    rgb = Image.new("RGB", image.size)
    # A tile at a time, because the copies in RGBA need much memory.
    for box in tile_boxes(image.size):
        tile = to_rgba(image.crop(box))
        if frame_alpha is not None:
            tile.putalpha(frame_alpha.crop(box))
        canvas = Image.new("RGBA", tile.size, (*rules.background, 255))
        rgb.paste(Image.alpha_composite(canvas, tile).convert("RGB"), box)

    return rgb


def frame_mask(image: Image.Image) -> Image.Image | None:
    """Return where the first frame of a GIF is, if it covers a part of the canvas only; else None."""
    if FRAME_BOX not in image.info:
        return None
    mask = Image.new("L", image.size)
    mask.paste(255, image.info[FRAME_BOX])
    return mask


def tile_boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (left, top, right, bottom) boxes of at most `TILE` pixels that cover an image of *size*."""
    width, height = size
    columns = min(width, TILE)
    rows = TILE // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def to_rgba(tile: Image.Image) -> Image.Image:
    """Convert *tile* to 8-bit RGBA, with the transparent color of a 16-bit gray image as alpha 0."""
    if tile.mode == "La":  # Pillow converts it to LA only
        tile = tile.convert("LA")
    if tile.mode not in SIXTEEN_BIT:
        return tile if tile.mode == "RGBA" else tile.convert("RGBA")

    values = np.asarray(tile)
    clipped: NDArray[np.uint32] = np.clip(values, 0, 65535).astype(np.uint32)
    # Round to the nearest; 65535 becomes 255.
    scaled = ((clipped + np.uint32(128)) // np.uint32(257)).astype(np.uint8)
    gray = Image.fromarray(scaled).convert("RGBA")

    transparent = tile.info.get("transparency")
    if isinstance(transparent, int):  # one of 65536 gray levels: compare before scaling
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        gray.putalpha(Image.fromarray(alpha))
    return gray


def correct_transparency_info(image: Image.Image) -> None:
    """Change `info` of an opened *image* to tell which of its decoded pixels will be transparent.

    Pillow stores the transparent color of a PNG at the file's bit depth, so that it matches no
    decoded pixel or a wrong one.
    """
    tiles = getattr(image, "tile", None)
    if not tiles:
        return

    _, box, _, raw_mode = tiles[0]
    color = image.info.get("transparency")
    if image.format == "PNG" and raw_mode in GRAY_STEPS and isinstance(color, int):
        image.info["transparency"] = color * GRAY_STEPS[raw_mode]
    elif image.format == "PNG" and raw_mode == "RGB;16B" and isinstance(color, tuple):
        # Pillow decodes only the upper byte of a 16-bit value.
        image.info["transparency"] = tuple(value >> 8 for value in color)

    is_first_frame = image.format == "GIF" and image.tell() == 0
    if is_first_frame and color is None and box != (0, 0, *image.size):
        # Pillow fills the canvas around a smaller first frame with the first color of the
        # palette.
        image.info[FRAME_BOX] = box


def center_view(size: tuple[int, int], rules: Preprocess) -> View:
    """Compute what the network sees of an image of *size*: all if *rules* pad it, else the center."""
    width, height = resized_size(size, rules)
    if rules.fit == "pad":
        return View((0, 0, *size), (width, height))

    # How many source pixels a pixel of the resized image has.
    x = size[0] / width
    y = size[1] / height

    # Left and top are not negative, because the crop is at most `resize`.
    left, top = (round((side - rules.crop) / 2.0) for side in (width, height))
    # Rounding may move right and bottom out of the image.
    right = min(size[0], (left + rules.crop) * x)
    bottom = min(size[1], (top + rules.crop) * y)
    return View((left * x, top * y, right, bottom), (rules.crop, rules.crop))


def center_crop(image: Image.Image, rules: Preprocess) -> Pixels:
    """Resize an RGB *image* to `resized_size` and crop its center; returns (crop, crop, 3) uint8.

    With the fit "crop", it equals torchvision's `Resize(resize)` and `CenterCrop(crop)` on a
    PIL image pixel for pixel. For strips with an aspect ratio above `MAX_ASPECT_RATIO` only the
    cropped part is computed (a few gray levels off): 1 x 20000 pixels cost no more than a
    photograph.
    """
    width, height = resized_size(image.size, rules)

    if max(width, height) > MAX_ASPECT_RATIO * rules.resize:
        view = center_view(image.size, rules)
        return np.asarray(resize_by_rules(image, view.size, rules, view.box))
    left, top = (round((side - rules.crop) / 2.0) for side in (width, height))
    window = (left, top, left + rules.crop, top + rules.crop)
    return np.asarray(resize_by_rules(image, (width, height), rules).crop(window))


def list_changes(image: Image.Image, rules: Preprocess) -> tuple[str, ...]:
    """List the conversions of the loaded *image* by `to_rgb` that users should know of, as warning codes."""
    # A frame may leave out a part of the image.
    has_transparent_pixels = FRAME_BOX in image.info
    if image.has_transparency_data:
        tiles = (to_rgba(image.crop(box)) for box in tile_boxes(image.size))
        alphas = (tile.getchannel("A") for tile in tiles)
        has_transparent_pixels = any(
            alpha.histogram()[255] < alpha.width * alpha.height for alpha in alphas
        )

    conversions = {
        "alpha_flattened": has_transparent_pixels,
        "exif_rotated": rules.exif_orientation and exif_orientation(image) != UPRIGHT,
        "sixteen_bit_scaled": image.mode in SIXTEEN_BIT,
    }
    return tuple(name for name, applies in conversions.items() if applies)
