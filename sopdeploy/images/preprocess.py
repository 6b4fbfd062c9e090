"""Rules of preprocessing, from a decoded image to network input, shared by training, export and service.

`sopdeploy.images.pixels` applies them, except for mean and standard deviation, which the exported graph
applies. Checkpoint and bundle store all rules. Importing this module does not load Pillow, because a process
that runs a network on pixels needs the rules, but no image library.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import Positive, StrictModel, first_problem
from sopdeploy.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]
Channel = Annotated[int, pydantic.Field(ge=0, le=255)]
Pixels = NDArray[np.uint8]
TtaMode = Literal["none", "flip", "ten-crop", "pad-crop"]
Fit = Literal["crop", "pad", "squash"]
INTERPOLATIONS = ("bilinear", "bicubic")
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image

TIMM_CROP_MODES: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}
TTA_PAD = 4  # pixels on each side


class Preprocess(StrictModel):
    """Preprocessing rules of one network; its input has `crop` x `crop` pixels.

    `fit` says how an image becomes a square. "crop" resizes the shorter side to `resize` pixels and crops the
    center. "pad" resizes the longer side to `crop` pixels and centers the image on `background`. "squash"
    resizes both sides to `crop` pixels. `resize` is used by "crop" only. `mean` and `std` refer to pixel
    values in [0, 1]. Transparent pixels are composited onto `background`.
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

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> "Preprocess":
        """Convert timm's data config: `timm.data.resolve_data_config`, or the `pretrained_cfg` of a model.

        timm pads with the mean color, which becomes `background`. Raises `ConfigError` for an input that is
        not square RGB, an interpolation other than bilinear and bicubic, or a `crop_pct` below 1 where the
        image is squashed or padded.
        """
        channels, height, width = config.get("input_size", (3, 224, 224))
        if channels != 3 or height != width:
            raise ConfigError(f"timm: input of {channels} x {height} x {width}; only 3 x S x S is supported")
        mode = str(config.get("crop_mode") or "center")
        if mode not in TIMM_CROP_MODES:
            raise ConfigError(f"timm: crop_mode {mode!r}; supported are {', '.join(TIMM_CROP_MODES)}")
        kept = float(config.get("crop_pct") or 1)
        if mode != "center" and kept != 1:
            raise ConfigError(
                f"timm: crop_mode {mode!r} with crop_pct {kept:g} is not supported; choose rules "
                "that keep the whole image, or another network"
            )
        colors = {name: tuple(config[name]) for name in ("mean", "std") if name in config}
        if mode == "border" and "mean" in colors:
            colors["background"] = tuple(round(255 * value) for value in colors["mean"])
        return cls._published(
            "timm",
            crop=height,
            resize=max(height, math.floor(height / kept)),
            fit=TIMM_CROP_MODES[mode],
            interpolation=config.get("interpolation", "bilinear"),
            **colors,
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
        if fields["interpolation"] not in INTERPOLATIONS:
            raise ConfigError(
                f"{source}: interpolation {fields['interpolation']!r}; supported are "
                f"{', '.join(INTERPOLATIONS)}"
            )
        try:
            return cls(**fields)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{source}: {first_problem(error)}") from error

    def __call__(self, image: "Image.Image") -> Pixels:
        """Convert *image* to the input of the network, (crop, crop, 3) uint8: `pixels.preprocess_image`."""
        from sopdeploy.images.pixels import preprocess_image  # noqa: PLC0415  # loads Pillow

        return preprocess_image(image, self)


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
    center crop. "flip" adds its mirror image. "ten-crop" adds the four corners of the central square and
    mirrors all five (Krizhevsky et al., NIPS 2012, section 4.1). "pad-crop" is one view: a random crop after
    padding with 4 black pixels (GM-SOP, starred rows of Table 3). Its offset depends on the pixels only.
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
