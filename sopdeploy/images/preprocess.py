"""How a picture becomes the network's input: the one truth for training, export and service.

A picture leaves this module as a uint8 array of shape (crop, crop, 3), RGB. Mean and standard
deviation are part of the exported graph, so no server can get them wrong; they are kept here as
they travel with the geometry, in the checkpoint and in the bundle.
"""

from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sopdeploy.config import Positive, StrictModel
from sopdeploy.images.color import SIXTEEN_BIT, in_rgb, is_transparent

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]
Colour = Annotated[int, pydantic.Field(ge=0, le=255)]

LONGEST_STRIP = 16  # resized whole up to this ratio of its sides
ORIENTATION, UPRIGHT = 0x0112, 1  # of EXIF
SIDEWAYS = range(5, 9)  # the orientations that exchange width and height
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Preprocess(StrictModel):
    """Geometry and colour rules of one network's input.

    `resize` is the length of the shorter side in pixels before the centre crop of `crop` x `crop`;
    `mean` and `std` are in units of the 0..1 range; transparent pixels show `background`.
    """

    resize: Side = 256
    crop: Side = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    background: tuple[Colour, Colour, Colour] = (255, 255, 255)
    exif_orientation: bool = True

    @pydantic.model_validator(mode="after")
    def _crop_fits(self) -> "Preprocess":
        if self.crop > self.resize:
            raise ValueError(f"crop ({self.crop}) is larger than resize ({self.resize})")
        return self

    def __call__(self, picture: Image.Image) -> NDArray[np.uint8]:
        """Return the (crop, crop, 3) uint8 array of *picture*: upright, RGB, resized, cropped."""
        return centre_crop(to_rgb(picture, self), self)

    def changes(self, picture: Image.Image) -> tuple[str, ...]:
        """Name what `__call__` does to a loaded *picture* that its owner may not expect, in order."""
        found = {
            "alpha_flattened": is_transparent(picture),
            "exif_rotated": self.exif_orientation and is_turned(picture),
            "sixteen_bit_scaled": picture.mode in SIXTEEN_BIT,
        }
        return tuple(name for name, holds in found.items() if holds)


def to_rgb(picture: Image.Image, rules: Preprocess) -> Image.Image:
    """Return *picture* upright and in RGB, transparency laid onto the declared background."""
    return in_rgb(upright(picture) if rules.exif_orientation else picture, rules.background)


def upright(picture: Image.Image) -> Image.Image:
    """Return *picture* turned as its EXIF orientation says; unreadable EXIF data is ignored."""
    if not is_turned(picture):  # Pillow would copy the picture all the same
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow also writes the data anew, and damaged tags fail there in many ways
        return picture


def is_turned(picture: Image.Image) -> bool:
    """Say whether the EXIF orientation of *picture* is another than upright; unreadable data says no."""
    return orientation(picture) in range(2, 9)


def orientation(picture: Image.Image) -> Any:
    """Return the EXIF orientation of *picture*, upright where there is none or its data is unreadable."""
    try:
        return picture.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # as in `upright`
        return UPRIGHT


def centre_crop(picture: Image.Image, rules: Preprocess) -> NDArray[np.uint8]:
    """Return the centre crop of an RGB *picture* after resizing its shorter side.

    Pixel for pixel torchvision's `Resize(resize)` and `CenterCrop(crop)` on a PIL picture. Only of a strip
    that would become longer than `LONGEST_STRIP` times its width is the part computed that the crop shows
    (within a few grey levels), so that 1 x 20000 pixels cost no more than a photograph.
    """
    width, height = picture.size
    if width <= height:
        size = (rules.resize, max(1, int(rules.resize * height / width)))
    else:
        size = (max(1, int(rules.resize * width / height)), rules.resize)
    left = round((size[0] - rules.crop) / 2.0)
    top = round((size[1] - rules.crop) / 2.0)
    right, bottom = left + rules.crop, top + rules.crop
    resampling = RESAMPLING[rules.interpolation]
    if max(size) <= LONGEST_STRIP * rules.resize:
        return np.asarray(picture.resize(size, resampling).crop((left, top, right, bottom)))
    scale_x, scale_y = width / size[0], height / size[1]
    box = (left * scale_x, top * scale_y, min(width, right * scale_x), min(height, bottom * scale_y))
    return np.asarray(picture.resize((rules.crop, rules.crop), resampling, box=box))
