"""What training does to a picture instead of the centre crop: four ways, each with or without mirroring.

All of them start from the RGB picture that the service would see and end in a uint8 array of the crop's
size; what they draw is a function of (seed, epoch, sample).
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Annotated, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.config import Fraction, Positive, StrictModel
from sopdeploy.data.base import ImagesDataset
from sopdeploy.data.image_files import ImageFiles, loaded
from sopdeploy.data.rand_augment import RandAugment
from sopdeploy.images.preprocess import (
    RESAMPLING,
    SIDEWAYS,
    Preprocess,
    Side,
    center_crop,
    exif_orientation,
    to_rgb,
)
from sopdeploy.seeds import derive_seed

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the source
PositiveFraction = Annotated[float, pydantic.Field(gt=0, le=1)]


class CenterCrop(StrictModel):
    """No crop of its own: the picture is prepared as in evaluation, then mirrored with chance `flip`."""

    kind: Literal["centre"]
    flip: Fraction = 0.0

    def crop(self, picture: Image.Image, rules: Preprocess, _random: Random) -> NDArray[np.uint8]:
        """Return the centre crop."""
        return center_crop(picture, rules)


class PadCrop(StrictModel):
    """The centre crop in a black frame of `pad` pixels, a window of the crop's size cut out of it.

    Source: He et al. (CVPR 2016), section 4.2.
    """

    kind: Literal["pad-crop"]
    flip: Fraction = 0.0
    pad: Annotated[int, pydantic.Field(ge=1)] = 4

    def crop(self, picture: Image.Image, rules: Preprocess, random: Random) -> NDArray[np.uint8]:
        """Return the window."""
        framed = np.pad(center_crop(picture, rules), ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        top, left = random.randint(0, 2 * self.pad), random.randint(0, 2 * self.pad)
        return framed[top : top + rules.crop, left : left + rules.crop]


class Boxed(StrictModel):
    """What cuts a random box out of the picture and resizes it.

    With `draft` a JPEG is decoded at a half, a quarter or an eighth of its size where the box still has the
    crop's pixels then: faster, and a few grey levels off (`benchmarks/training_throughput.py` says how many).
    """

    flip: Fraction = 0.0
    draft: bool = False

    def crop(self, picture: Image.Image, rules: Preprocess, random: Random) -> NDArray[np.uint8]:
        """Return the box, resized; computed from the part of the picture that it shows."""
        return cut(picture, self.box(picture.size, rules.crop, random), rules)

    def box(self, _size: tuple[int, int], _crop: int, _random: Random) -> Box:
        """Return a box inside a picture of *size*, in its pixels."""
        raise TypeError(f"{type(self).__name__} must say what it cuts out")


class RandomResizedCrop(Boxed):
    """A box of random area (`scale`, a fraction of the picture) and shape (`ratio`, width by height).

    Source: Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015); drawn as torchvision does.
    """

    kind: Literal["random-resized-crop"]
    scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (0.75, 4 / 3)

    def box(self, size: tuple[int, int], _crop: int, random: Random) -> Box:
        """Return a box inside *size*; the largest centred one of an allowed shape if ten draws miss."""
        width, height = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * random.uniform(*self.scale)
            shape = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


class RandomSide(Boxed):
    """The shorter side resized to a random length in `sides`, a window of the crop's size cut out.

    Source: He et al. (CVPR 2016), section 3.4; DSoP, section V-B.
    """

    kind: Literal["random-side"]
    sides: tuple[Side, Side] = (256, 512)

    def box(self, size: tuple[int, int], crop: int, random: Random) -> Box:
        """Return the window in pixels of the picture."""
        width, height = size
        side = max(crop, random.randint(*self.sides))
        pixel = min(width, height) / side  # of the resized picture, in pixels of the source
        window = crop * pixel
        left, top = random.random() * (width - window), random.random() * (height - window)
        return left, top, min(width, left + window), min(height, top + window)


Augmentation = Annotated[
    CenterCrop | PadCrop | RandomResizedCrop | RandomSide, pydantic.Field(discriminator="kind")
]


def cut(picture: Image.Image, box: Box, rules: Preprocess) -> NDArray[np.uint8]:
    """Return *box* of *picture*, resized to the crop."""
    resized = picture.resize((rules.crop, rules.crop), RESAMPLING[rules.interpolation], box=box)
    return np.asarray(resized, dtype=np.uint8)


def crop_of_draft(
    pictures: ImageFiles, index: int, way: Boxed, rules: Preprocess, random: Random
) -> tuple[NDArray[np.uint8], int]:
    """Return the crop of a picture that is decoded no larger than needed, and its class.

    What is drawn is drawn from the picture's full size, so that the same part is shown as without.
    """
    picture = pictures.header(index)
    width, height = picture.size
    turned = rules.exif_orientation and exif_orientation(picture) in SIDEWAYS
    size = (height, width) if turned else (width, height)
    box = way.box(size, rules.crop, random)
    left, top, right, bottom = box
    shrink = max(1, int(min(right - left, bottom - top) / rules.crop))
    picture.draft(None, (width // shrink, height // shrink))
    decoded = to_rgb(loaded(picture, pictures.where(index)), rules)
    x, y = decoded.width / size[0], decoded.height / size[1]
    return cut(decoded, (left * x, top * y, right * x, bottom * y), rules), int(pictures.targets[index])


NONE = RandAugment()


@dataclass(frozen=True, slots=True)
class AugmentedDataset(ImagesDataset):
    """Pictures as one epoch of training sees them: a function of seed, epoch and sample.

    A sample that an epoch shows again is asked for as `sample + copy * len`, so that it looks different.
    """

    augmentation: Augmentation
    preprocess: Preprocess
    seed: int
    epoch: int
    distortion: RandAugment = NONE

    def __getitem__(self, position: int) -> tuple[NDArray[np.uint8], int]:
        index = position % len(self.pictures)
        random = Random(derive_seed(self.seed, "augment", self.epoch, position))  # noqa: S311
        way, rules = self.augmentation, self.preprocess
        if isinstance(way, Boxed) and way.draft and isinstance(self.pictures, ImageFiles):
            array, label = crop_of_draft(self.pictures, index, way, rules, random)
        else:
            stored, label = self.pictures[index]
            array = way.crop(to_rgb(stored, rules), rules, random)
        if random.random() < way.flip:
            array = array[:, ::-1]
        seed = derive_seed(self.seed, "distort", self.epoch, position)
        return self.distortion(array, rules, seed), label
