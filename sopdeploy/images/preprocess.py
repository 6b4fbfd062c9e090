"""Rules of preprocessing, from a decoded image to network input, shared by training, export and service.

`sopdeploy.images.pixels` applies them up to the resized RGB image; the exported graph makes it
gray, if the network takes gray images, and applies mean and standard deviation.
Checkpoint and bundle store all rules. Importing this module does not load Pillow, because a
process that runs a network on pixels needs the rules, but no image library.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import Positive, StrictModel, first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.images.torchvision_steps import read_steps

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]
Channel = Annotated[int, pydantic.Field(ge=0, le=255)]
Pixels = NDArray[np.uint8]
Decoding = Literal["full", "scaled", "fast"]
Fit = Literal["crop", "pad", "squash", "squash-crop"]


def _in_list(value: Any) -> Any:
    """Put a single number into a list."""
    return [value] if isinstance(value, int | float) else value


# left, top, right, bottom in pixels of the upright image
Box = tuple[float, float, float, float]

# One value per channel of the network's input
ChannelValues = Annotated[tuple[float, ...], pydantic.BeforeValidator(_in_list)]
PositiveChannelValues = Annotated[tuple[Positive, ...], pydantic.BeforeValidator(_in_list)]
# Of red, green and blue in a gray image (ITU-R BT.601), as in Pillow, torchvision and OpenCV
GRAY_WEIGHTS = (0.299, 0.587, 0.114)
TIMM_CROP_MODES: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}


class Preprocess(StrictModel):
    """Preprocessing rules of one network; its input has `crop` x `crop` pixels.

    `fit` says how an image becomes a square. "crop" resizes the shorter side to `resize` pixels
    and crops the center. "pad" resizes the longer side to `crop` pixels and centers the image
    on `background`. "squash" resizes both sides to `crop` pixels, "squash-crop" to `resize`
    pixels, and crops the center. `resize` is used by "crop" and "squash-crop" only; without it,
    it follows `crop`. Transparent pixels are composited onto `background`.

    `channels` is 3, or 1 for a network that takes gray images: 0.299 R + 0.587 G + 0.114 B of the
    resized image. `mean` and `std` refer to pixel values in [0, 1]. They have one value per
    channel; a single value counts for all channels, and three equal values count as one in gray
    images. `channels` is left out of what is written if it is 3.

    `decoding` says how many pixels of a JPEG are decoded. "full" decodes all and resizes the
    whole image. "scaled" decodes at a scale of 1/8, 1/4, 1/2 or 1, the smallest at which both
    sides have at least twice the pixels that they are resized to. It resizes only the box that
    the crop keeps. "fast" does the same, but resizes with fast_image_resize in place of Pillow, in
    an eighth of the time, with pixels that differ as `fast_resize.MAX_LEVELS` says. `decoding` is
    left out of what is written if it is "full", as in files of versions that do not know it.

    `antialias` is False if an image becomes smaller without antialiasing, as by `cv2.resize` and
    torch's `interpolate`: a pixel then depends on its nearest source pixels alone. `color_order` is
    "BGR" for a network that takes blue first, as OpenCV reads images; `mean` and `std` have the order
    of the network's channels. Both are left out of what is written if they are True and "RGB".

    Raises:
        ConfigError: `crop` is larger than `resize`, a value is out of its range, `mean` or `std`
            have several values for gray images, or two values do not fit together.

    Examples:
        >>> sopdeploy.Preprocess(crop=64).resize
        73
    """

    resize: Side = 256
    crop: Side = 224
    fit: Fit = "crop"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Annotated[
        Literal[1, 3], pydantic.Field(exclude_if=lambda channels: channels == 3)
    ] = 3
    mean: ChannelValues = (0.485, 0.456, 0.406)
    std: PositiveChannelValues = (0.229, 0.224, 0.225)
    background: tuple[Channel, Channel, Channel] = (255, 255, 255)
    exif_orientation: bool = True
    decoding: Annotated[
        Decoding, pydantic.Field(exclude_if=lambda decoding: decoding == "full")
    ] = "full"
    antialias: Annotated[bool, pydantic.Field(exclude_if=lambda antialias: antialias)] = True
    color_order: Annotated[
        Literal["RGB", "BGR"], pydantic.Field(exclude_if=lambda order: order == "RGB")
    ] = "RGB"

    @pydantic.model_validator(mode="after")
    def _set_resize(self) -> "Preprocess":
        """Set `resize` where only `crop` is given; raise `ValueError` if `crop` is larger."""
        # A crop alone sets the other side in the usual ratio.
        if "crop" in self.model_fields_set and "resize" not in self.model_fields_set:
            vars(self)["resize"] = self.scaled_resize(self.crop, resize=256, crop_before=224)
        if self.crop > self.resize:
            raise ValueError(f"crop ({self.crop}) is larger than resize ({self.resize})")
        return self

    @pydantic.model_validator(mode="after")
    def _set_values_of_channels(self) -> "Preprocess":
        """Give `mean` and `std` one value per channel; raise `ValueError` if they have other values."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            is_single = len(values) in (1, 3) and len(set(values)) == 1
            if is_single:
                vars(self)[name] = values[:1] * self.channels
            elif len(values) != 3:
                raise ValueError(f"{name} must have three values or one (got {[*values]})")
            elif self.channels == 1:
                raise ValueError(
                    f"{name} must have one value, such as [0.5], if channels is 1 (got {[*values]})"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "Preprocess":
        """Raise `ValueError` for values that do not fit together."""
        if self.channels == 1 and self.color_order != "RGB":
            raise ValueError("color_order must be RGB if channels is 1")
        if not self.antialias and self.decoding != "full":
            raise ValueError(
                f"decoding must be full if antialias is false (got {self.decoding!r})"
            )
        return self

    @property
    def rgb_mean(self) -> tuple[float, ...]:
        """`mean` in the order red, green, blue; one value for gray images."""
        return self.mean[::-1] if self.color_order == "BGR" else self.mean

    @staticmethod
    def scaled_resize(crop: int, resize: int, crop_before: int) -> int:
        """Return the value of `resize` for *crop* in the ratio of *resize* to *crop_before*."""
        return max(crop, round(crop * resize / crop_before))

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> "Preprocess":
        """Convert timm's data config: `timm.data.resolve_data_config`, or the `pretrained_cfg` of a model.

        timm pads with the mean color, which becomes `background`. Raises `ConfigError` for an
        input that is not square, RGB or gray, an interpolation other than bilinear and bicubic, or a
        `crop_pct` below 1 where the image is squashed or padded.
        """
        channels, height, width = config.get("input_size", (3, 224, 224))
        if channels not in (1, 3) or height != width:
            raise ConfigError(
                f"timm: input of {channels} x {height} x {width}; only 3 x S x S and 1 x S x S are "
                "supported"
            )

        # Timm's modes of cropping: the center, the whole image in a square, or with a border.
        mode = str(config.get("crop_mode") or "center")
        if mode not in TIMM_CROP_MODES:
            raise ConfigError(
                f"timm: crop_mode {mode!r}; supported are {', '.join(TIMM_CROP_MODES)}"
            )
        crop_share = float(config.get("crop_pct") or 1)
        if mode != "center" and crop_share != 1:
            raise ConfigError(
                f"timm: crop_mode {mode!r} with crop_pct {crop_share:g} is not "
                "supported; choose rules that keep the whole image, or another "
                "network"
            )

        colors = {name: tuple(config[name]) for name in ("mean", "std") if name in config}
        if mode == "border" and "mean" in colors:
            background = tuple(round(255 * value) for value in colors["mean"])
            colors["background"] = background * (3 // len(background))

        return cls._from_published(
            "timm",
            channels=channels,
            crop=height,
            resize=max(height, math.floor(height / crop_share)),  # not below `crop`
            fit=TIMM_CROP_MODES[mode],
            interpolation=config.get("interpolation", "bilinear"),
            **colors,
        )

    @classmethod
    def from_torchvision(cls, transforms: Any) -> "Preprocess":
        """Convert torchvision's `weights.transforms()`, the preset of a classifier, or a `Compose`.

        The steps of a `Compose` may be those of a validation: `Resize`, `CenterCrop`, `ToTensor` and its like,
        `Normalize`, `Grayscale`, and timm's `ResizeKeepRatio` and `CenterCropOrPad`.
        Raises `ConfigError` for another object or step, which it names, for images that are not
        square, and for an interpolation other than bilinear and bicubic.
        """
        if hasattr(transforms, "transforms") or type(transforms).__name__ == "Sequential":
            return cls._from_published("torchvision", **read_steps(transforms))
        try:
            # Each has one side; two raise a `ValueError`.
            (crop,) = transforms.crop_size
            (resize,) = transforms.resize_size
            interpolation = str(transforms.interpolation.value)
            colors = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"torchvision: a {type(transforms).__name__} is neither a Compose nor the preset of a classifier "
                "(weights.transforms())"
            ) from error

        fields = {"crop": crop, "resize": resize, "interpolation": interpolation, **colors}
        return cls._from_published("torchvision", **fields)

    @classmethod
    def _from_published(cls, source: str, **fields: Any) -> "Preprocess":
        """Build rules of *fields* that *source* publishes; raise `ConfigError` for those not supported."""
        try:
            return cls(**fields)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{source}: {first_problem(error, fields)}") from error

    def in_gray(self) -> "Preprocess":
        """Return these rules for a network that takes gray images.

        Raises `ConfigError` if `mean` or `std` have several values.
        """
        try:
            return Preprocess(**{**self.model_dump(), "channels": 1})
        except pydantic.ValidationError as error:
            raise ConfigError(
                f"the network takes gray images; {first_problem(error)}: give mean and std of its training",
                setting="preprocess",
            ) from error

    @classmethod
    def of_convention(cls, name: str, side: int = 224) -> "Preprocess":
        """Return the rules of a usual convention for inputs of *side* x *side* pixels.

        "imagenet" follows torchvision's training scripts and "timm" follows timm: the shorter side
        becomes 8/7 of *side*, bilinear or bicubic. "clip" follows OpenAI's CLIP: the shorter side
        becomes *side*. "none" is "imagenet" with pixel values in [0, 1].
        Raises `KeyError` for another name.
        """
        fields: dict[str, Any] = {"resize": side * 8 // 7, "crop": side}
        fields |= CONVENTIONS[name](side)  # can have another size
        return cls._from_published(name, **fields)


CONVENTIONS: dict[str, Callable[[int], Mapping[str, int | str | tuple[float, ...]]]] = {
    "imagenet": lambda _: {},
    "timm": lambda _: {"interpolation": "bicubic"},
    "clip": lambda side: {
        "resize": side,
        "interpolation": "bicubic",
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    "none": lambda _: {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
}
