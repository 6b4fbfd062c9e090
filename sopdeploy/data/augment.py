"""Training augmentation: the crop that replaces the center crop, mirroring, then RandAugment.

Every augmentation maps an RGB image to a uint8 array of the crop size. Random choices depend on (seed, epoch,
sample) only.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Annotated, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.config import Fraction, Positive, StrictModel
from sopdeploy.data.base import ImagesDataset, derive_seed
from sopdeploy.data.image_files import ImageFiles, load_pixels
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

Box = tuple[float, float, float, float]  # left, top, right, bottom in source pixels
NO_RAND_AUGMENT = RandAugment()
PositiveFraction = Annotated[float, pydantic.Field(gt=0, le=1)]


class CenterCrop(StrictModel):
    """Center crop as in evaluation, mirrored with probability `flip`."""

    kind: Literal["centre", "center"]
    flip: Fraction = 0.0

    def crop(self, image: Image.Image, rules: Preprocess, _random: Random) -> NDArray[np.uint8]:
        """Crop the center of *image*."""
        return center_crop(image, rules)


class PadCrop(StrictModel):
    """Random crop of the center crop after padding it with `pad` black pixels on each side.

    Source: He et al. (CVPR 2016), section 4.2.
    """

    kind: Literal["pad-crop"]
    flip: Fraction = 0.0
    pad: Annotated[int, pydantic.Field(ge=1)] = 4

    def crop(self, image: Image.Image, rules: Preprocess, random: Random) -> NDArray[np.uint8]:
        """Crop a random window of the padded center crop."""
        padded = np.pad(center_crop(image, rules), ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        top, left = random.randint(0, 2 * self.pad), random.randint(0, 2 * self.pad)
        return padded[top : top + rules.crop, left : left + rules.crop]


class BoxCrop(StrictModel):
    """Base class of augmentations that crop a random box and resize it.

    With `draft`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box still has the pixels of the
    crop: faster, but a few gray levels off (`benchmarks/training_throughput.py` measures how many).
    """

    flip: Fraction = 0.0
    draft: bool = False

    def crop(self, image: Image.Image, rules: Preprocess, random: Random) -> NDArray[np.uint8]:
        """Crop a random box of *image* and resize it."""
        return _resize_box(image, self.box(image.size, rules.crop, random), rules)

    @abstractmethod
    def box(self, size: tuple[int, int], crop: int, random: Random) -> Box:
        """Draw a box inside an image of *size* (width, height)."""


class RandomResizedCrop(BoxCrop):
    """Box of random area (`scale`, a fraction of the image) and aspect ratio (`ratio`, width / height).

    Source: Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015); drawn as torchvision does.
    """

    kind: Literal["random-resized-crop"]
    scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (0.75, 4 / 3)

    def box(self, size: tuple[int, int], crop: int, random: Random) -> Box:  # noqa: ARG002
        """Draw a box; after ten misses, the largest centered box of an allowed aspect ratio."""
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


class RandomSide(BoxCrop):
    """Resize of the shorter side to a random length in `sides`, then a random crop.

    Source: He et al. (CVPR 2016), section 3.4; DSoP, section V-B.
    """

    kind: Literal["random-side"]
    sides: tuple[Side, Side] = (256, 512)

    def box(self, size: tuple[int, int], crop: int, random: Random) -> Box:
        """Draw a square box in source pixels."""
        width, height = size
        side = max(crop, random.randint(*self.sides))
        window = crop * (min(width, height) / side)
        left, top = random.random() * (width - window), random.random() * (height - window)
        return left, top, min(width, left + window), min(height, top + window)


Augmentation = Annotated[
    CenterCrop | PadCrop | RandomResizedCrop | RandomSide, pydantic.Field(discriminator="kind")
]


@dataclass(frozen=True, slots=True)
class AugmentedDataset(ImagesDataset):
    """Augmented images of one epoch.

    Repeated uses of a sample have the indices `sample + copy * len(self)` and are augmented differently.
    """

    augmentation: Augmentation
    preprocess: Preprocess
    seed: int
    epoch: int
    rand_augment: RandAugment = NO_RAND_AUGMENT

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        sample = index % len(self.images)
        random = Random(derive_seed(self.seed, "augment", self.epoch, index))  # noqa: S311
        rules, augmentation = self.preprocess, self.augmentation
        if isinstance(augmentation, BoxCrop) and augmentation.draft and isinstance(self.images, ImageFiles):
            array, target = _crop_draft(self.images, sample, augmentation, rules, random)
        else:
            image, target = self.images[sample]
            array = augmentation.crop(to_rgb(image, rules), rules, random)
        if random.random() < augmentation.flip:
            array = array[:, ::-1]
        seed = derive_seed(self.seed, "distort", self.epoch, index)
        return self.rand_augment(array, rules, seed), target


def _resize_box(image: Image.Image, box: Box, rules: Preprocess) -> NDArray[np.uint8]:
    resized = image.resize((rules.crop, rules.crop), RESAMPLING[rules.interpolation], box=box)
    return np.asarray(resized, dtype=np.uint8)


def _crop_draft(
    images: ImageFiles, index: int, augmentation: BoxCrop, rules: Preprocess, random: Random
) -> tuple[NDArray[np.uint8], int]:
    """Decode an image no larger than needed and crop the box that is drawn from its full size."""
    image = images.open(index)
    width, height = image.size
    sideways = rules.exif_orientation and exif_orientation(image) in SIDEWAYS
    size = (height, width) if sideways else (width, height)
    left, top, right, bottom = augmentation.box(size, rules.crop, random)
    factor = max(1, int(min(right - left, bottom - top) / rules.crop))
    image.draft(None, (width // factor, height // factor))
    decoded = to_rgb(load_pixels(image, images.path(index)), rules)
    x, y = decoded.width / size[0], decoded.height / size[1]
    return _resize_box(decoded, (left * x, top * y, right * x, bottom * y), rules), int(images.targets[index])
