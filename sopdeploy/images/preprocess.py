"""Preprocessing from a decoded image to network input, shared by training, export and service.

The result is a uint8 RGB array of shape (crop, crop, 3). Mean and standard deviation are part of the exported
graph; they are stored here with the geometry, in the checkpoint and in the bundle.

Color conversions with intermediate results run in tiles. On the whole image they would need six times the
memory of the RGB image, and a PNG of 100 kB can have 50 megapixels.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sopdeploy.config import Positive, StrictModel, first_problem
from sopdeploy.errors import ConfigError

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]
Channel = Annotated[int, pydantic.Field(ge=0, le=255)]
Pixels = NDArray[np.uint8]
TtaMode = Literal["none", "flip", "ten-crop", "pad-crop"]
Fit = Literal["crop", "pad", "squash"]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image

MAX_ASPECT_RATIO = 16  # longer strips are not resized as a whole
EXIF_ORIENTATION, UPRIGHT = 0x0112, 1
ROTATED = range(2, 9)  # EXIF orientations that are valid and not upright
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L"}
TIMM_CROP_MODES: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}
TILE = 2**16  # pixels
TTA_PAD = 4  # pixels on each side
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # distance of two gray values of such a PNG, in 8-bit levels


class Preprocess(StrictModel):
    """Preprocessing rules of one network; its input has `crop` x `crop` pixels.

    `fit` says how an image becomes a square. "crop" resizes the shorter side to `resize` pixels and crops the
    center. "pad" resizes the longer side to `crop` pixels and centers the image on `background`. "squash"
    resizes both sides to `crop` pixels. `resize` counts for "crop" only; a `fit` of "crop" is not written to
    files. `mean` and `std` refer to pixel values in [0, 1]. Transparent pixels are composited onto
    `background`.
    """

    resize: Side = 256
    crop: Side = 224
    fit: Fit = "crop"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    background: tuple[Channel, Channel, Channel] = (255, 255, 255)
    exif_orientation: bool = True

    @pydantic.model_validator(mode="after")
    def _crop_fits(self) -> "Preprocess":
        if self.crop > self.resize:
            raise ValueError(f"crop ({self.crop}) is larger than resize ({self.resize})")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _omit_crop(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return {key: value for key, value in fields.items() if (key, value) != ("fit", "crop")}

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> "Preprocess":
        """Convert timm's data config: `timm.data.resolve_data_config`, or the `pretrained_cfg` of a model.

        Raises `ConfigError` for an input that is not square RGB, or an interpolation other than bilinear and
        bicubic.
        """
        channels, height, width = config.get("input_size", (3, 224, 224))
        if channels != 3 or height != width:
            raise ConfigError(f"timm: input of {channels} x {height} x {width}; only 3 x S x S is supported")
        mode = str(config.get("crop_mode") or "center")
        if mode not in TIMM_CROP_MODES:
            raise ConfigError(f"timm: crop_mode {mode!r}; supported are {', '.join(TIMM_CROP_MODES)}")
        return cls._published(
            "timm",
            crop=height,
            resize=max(height, math.floor(height / float(config.get("crop_pct") or 1))),
            fit=TIMM_CROP_MODES[mode],
            interpolation=config.get("interpolation", "bilinear"),
            **{name: tuple(config[name]) for name in ("mean", "std") if name in config},
        )

    @classmethod
    def from_torchvision(cls, transforms: Any) -> "Preprocess":
        """Convert torchvision's `weights.transforms()`, the preset of a classifier.

        Raises `ConfigError` for another object, or an interpolation other than bilinear and bicubic.
        """
        try:
            (crop,), (resize,) = transforms.crop_size, transforms.resize_size
            interpolation = str(transforms.interpolation.value)
            colors = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"torchvision: {type(transforms).__name__} does not resize and crop to a square; pass "
                "weights.transforms() of a classifier"
            ) from error
        return cls._published(
            "torchvision", crop=crop, resize=max(crop, resize), interpolation=interpolation, **colors
        )

    @classmethod
    def _published(cls, source: str, **fields: Any) -> "Preprocess":
        if fields["interpolation"] not in RESAMPLING:
            raise ConfigError(
                f"{source}: interpolation {fields['interpolation']!r}; supported are {', '.join(RESAMPLING)}"
            )
        try:
            return cls(**fields)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{source}: {first_problem(error)}") from error

    def __call__(self, image: Image.Image) -> Pixels:
        """Convert *image* to upright RGB and fit it to the network; returns (crop, crop, 3) uint8."""
        fit = {"crop": center_crop, "pad": pad_to_square, "squash": squash}[self.fit]
        return fit(to_rgb(image, self), self)

    def upright_size(self, image: Image.Image) -> tuple[int, int]:
        """Compute (width, height) of *image* after its EXIF rotation; reads no pixels."""
        sideways = self.exif_orientation and exif_orientation(image) in SIDEWAYS
        return (image.height, image.width) if sideways else (image.width, image.height)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Compute (width, height) that an image of *size* is resized to before it is cropped or padded."""
        if self.fit == "squash":
            return self.crop, self.crop
        shorter, longer = min(size), max(size)
        if self.fit == "pad":
            short, long = max(1, round(self.crop * shorter / longer)), self.crop
        else:
            short, long = self.resize, max(1, int(self.resize * longer / shorter))
        return (short, long) if size[0] <= size[1] else (long, short)

    def box(self, size: tuple[int, int]) -> Box:
        """Compute the part of an upright image of *size* that the network sees.

        With `fit` "pad" it is larger than the image, so it may begin at a negative coordinate.
        """
        resized = self.resized(size)
        left, top = (round((side - self.crop) / 2.0) for side in resized)
        scale_x, scale_y = size[0] / resized[0], size[1] / resized[1]
        return left * scale_x, top * scale_y, (left + self.crop) * scale_x, (top + self.crop) * scale_y

    def changes(self, image: Image.Image) -> tuple[str, ...]:
        """List the conversions of a loaded *image* that its owner may not expect, in order."""
        transparent = False
        if image.has_transparency_data:
            tiles = (_to_rgba(image.crop(box)) for box in tile_boxes(image.size))
            transparent = any(
                tile.getchannel("A").histogram()[255] < tile.width * tile.height for tile in tiles
            )
        conversions = {
            "alpha_flattened": transparent,
            "exif_rotated": self.exif_orientation and exif_orientation(image) in ROTATED,
            "sixteen_bit_scaled": image.mode in SIXTEEN_BIT,
        }
        return tuple(name for name, applies in conversions.items() if applies)


def to_rgb(image: Image.Image, rules: Preprocess) -> Image.Image:
    """Rotate *image* upright, convert it to RGB and composite it onto the background.

    The EXIF orientation is ignored where its data is unreadable. 16-bit gray is scaled to 8 bits; Pillow
    itself would clip it to white.
    """
    if rules.exif_orientation and exif_orientation(image) in ROTATED:  # Pillow copies upright images, too
        with contextlib.suppress(Exception):  # Pillow rewrites the tags; damaged ones fail in many ways
            image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode not in SIXTEEN_BIT and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for box in tile_boxes(image.size):
        tile = _to_rgba(image.crop(box))
        canvas = Image.new("RGBA", tile.size, (*rules.background, 255))
        rgb.paste(Image.alpha_composite(canvas, tile).convert("RGB"), box)
    return rgb


def exif_orientation(image: Image.Image) -> Any:
    """Read the EXIF orientation of *image*; upright (1) if it is absent or unreadable."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, UPRIGHT)
    except Exception:  # damaged tags fail in many ways
        return UPRIGHT


def tile_boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (left, top, right, bottom) boxes of at most `TILE` pixels that cover an image of *size*."""
    width, height = size
    columns = min(width, TILE)
    rows = TILE // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def _to_rgba(tile: Image.Image) -> Image.Image:
    if tile.mode not in SIXTEEN_BIT:
        return tile if tile.mode == "RGBA" else tile.convert("RGBA")
    values = np.asarray(tile)
    clipped: NDArray[np.uint32] = np.clip(values, 0, 65535).astype(np.uint32)
    scaled = ((clipped + np.uint32(128)) // np.uint32(257)).astype(np.uint8)  # nearest; 65535 becomes 255
    gray = Image.fromarray(scaled).convert("RGBA")
    transparent = tile.info.get("transparency")
    if isinstance(transparent, int):  # one of 65536 gray levels: compare before scaling
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def match_transparency(image: Image.Image) -> None:
    """Convert the transparent color of an opened PNG to 8 bits, as its decoded pixels will be.

    Pillow keeps that color at the file's bit depth, which matches no pixel or a wrong one after decoding. Of
    48-bit colors Pillow keeps the upper bytes of the pixels, so these are compared. Decodes nothing.
    """
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or not tiles:
        return
    coding, color = tiles[0][3], image.info.get("transparency")
    if coding in GRAY_STEPS and isinstance(color, int):
        image.info["transparency"] = color * GRAY_STEPS[coding]
    elif coding == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def center_crop(image: Image.Image, rules: Preprocess) -> Pixels:
    """Resize the shorter side of an RGB *image* and crop its center; returns (crop, crop, 3) uint8.

    Equals torchvision's `Resize(resize)` and `CenterCrop(crop)` on a PIL image pixel for pixel. For strips
    with an aspect ratio above `MAX_ASPECT_RATIO` only the cropped part is computed (a few gray levels off):
    1 x 20000 pixels cost no more than a photograph.
    """
    size = rules.resized(image.size)
    left = round((size[0] - rules.crop) / 2.0)
    top = round((size[1] - rules.crop) / 2.0)
    resampling = RESAMPLING[rules.interpolation]
    if max(size) <= MAX_ASPECT_RATIO * rules.resize:
        window = (left, top, left + rules.crop, top + rules.crop)
        return np.asarray(image.resize(size, resampling).crop(window))
    left_edge, top_edge, right, bottom = rules.box(image.size)
    box = (left_edge, top_edge, min(image.width, right), min(image.height, bottom))
    return np.asarray(image.resize((rules.crop, rules.crop), resampling, box=box))


def pad_to_square(image: Image.Image, rules: Preprocess) -> Pixels:
    """Resize the longer side of an RGB *image* and center it on the background; returns (crop, crop, 3)."""
    width, height = rules.resized(image.size)
    left, top = -round((width - rules.crop) / 2.0), -round((height - rules.crop) / 2.0)
    return _resize_onto_background(image, (0, 0, *image.size), (left, top, width, height), rules)


def squash(image: Image.Image, rules: Preprocess) -> Pixels:
    """Resize both sides of an RGB *image*, whatever its aspect ratio; returns (crop, crop, 3) uint8."""
    return np.asarray(image.resize((rules.crop, rules.crop), RESAMPLING[rules.interpolation]))


def resize_box(image: Image.Image, box: Box, rules: Preprocess) -> Pixels:
    """Resize *box* of an RGB *image* to (crop, crop, 3) uint8; outside of the image it has the background.

    The part of the box inside the image becomes a whole number of pixels, at least one per side.
    """
    ends, starts, lengths = [], [], []
    for low, high, limit in zip(box[:2], box[2:], image.size, strict=True):
        first, last = max(0.0, low), min(float(limit), high)
        scale = rules.crop / (high - low)
        length = min(rules.crop, max(1, round((last - first) * scale)))
        start = round(((first + last) / 2 - low) * scale - length / 2)
        ends.append((first, last))
        starts.append(min(max(0, start), rules.crop - length))
        lengths.append(length)
    (left, right), (top, bottom) = ends
    return _resize_onto_background(image, (left, top, right, bottom), (*starts, *lengths), rules)


def _resize_onto_background(
    image: Image.Image, source: Box, target: tuple[int, ...], rules: Preprocess
) -> Pixels:
    """Resize the box *source* of *image* to *target* (left, top, width, height) of the network's input."""
    left, top, width, height = target
    part = image.resize((width, height), RESAMPLING[rules.interpolation], box=source)
    if (width, height) == (rules.crop, rules.crop):
        return np.asarray(part)
    canvas = Image.new("RGB", (rules.crop, rules.crop), rules.background)
    canvas.paste(part, (left, top))
    return np.asarray(canvas)


def check_tta_mode(mode: str, preprocess: Preprocess) -> TtaMode:
    """Validate the test-time augmentation *mode*; raises `ConfigError`."""
    known: dict[str, TtaMode] = {name: name for name in get_args(TtaMode)}
    if mode not in known:
        raise ConfigError(f"--tta {mode}: not one of {', '.join(known)}")
    if mode == "ten-crop" and preprocess.fit != "crop":
        raise ConfigError(
            f"--tta ten-crop: the network sees the whole image (fit = {preprocess.fit}), so there are no "
            "corners to crop; use --tta flip"
        )
    if mode == "ten-crop" and preprocess.crop == preprocess.resize:
        raise ConfigError(
            f"--tta ten-crop: resize and crop are both {preprocess.resize}, so there are no corners to crop; "
            "use --tta flip"
        )
    return known[mode]


def tta_views(prepare: Callable[[Preprocess], Pixels], preprocess: Preprocess, mode: TtaMode) -> Pixels:
    """Compute the views of one image for test-time augmentation; returns (V, crop, crop, 3) uint8.

    *prepare* maps preprocessing rules to the preprocessed image. The first of several views is the plain
    center crop.
    "ten-crop" adds the four corners of the central square and mirrors all five (Krizhevsky et al., NIPS 2012,
    section 4.1). "pad-crop" is one view: a random crop after padding with 4 black pixels (GM-SOP, starred
    rows of Table 3). Its offset depends on the pixels only.
    """
    center = prepare(preprocess)
    if mode == "none":
        return center[None]
    if mode == "pad-crop":
        digest = hashlib.blake2b(center.tobytes(), digest_size=16).digest()
        top, left = (int.from_bytes(half, "big") % (2 * TTA_PAD + 1) for half in (digest[:8], digest[8:]))
        padded = np.pad(center, ((TTA_PAD, TTA_PAD), (TTA_PAD, TTA_PAD), (0, 0)))
        return padded[None, top : top + preprocess.crop, left : left + preprocess.crop]
    crops = [center]
    if mode == "ten-crop":
        side, crop = preprocess.resize, preprocess.crop
        square = prepare(preprocess.model_copy(update={"crop": side}))
        ends = (slice(0, crop), slice(side - crop, side))
        crops += [square[rows, columns] for rows in ends for columns in ends]
    return np.stack([*crops, *(view[:, ::-1] for view in crops)])
