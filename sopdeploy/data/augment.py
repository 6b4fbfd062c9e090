"""Training augmentation: the crop that replaces the center crop, mirroring and colors.

The result of one image is a uint8 array of the crop size. Random choices depend on (seed, epoch, sample)
only. With `preprocess.fit` "pad" or "squash", random boxes are drawn in the square that
evaluation sees, at twice its size: the padded image, or the image with both sides of equal
length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Annotated, Literal, assert_never

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.base.config import Fraction, StrictModel
from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.photos.network_inputs import (
    FittedDataset,
    FittedPixels,
    PreprocessedDataset,
    Window,
    crop_padded,
)
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.data.timm_augment import (
    Mixing,
    PositiveFraction,
    RandAugment,
    RandomErasing,
    seeded,
)
from sopdeploy.images.pixels import View
from sopdeploy.images.preprocess import Box, Preprocess, Side
from sopdeploy.images.resize import resize_by_rules

if TYPE_CHECKING:
    from torch import Tensor

# Principal components of the colors (0 to 1) of ImageNet's training images: columns, and
# standard deviations
COLOR_COMPONENTS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
COLOR_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
SQUARE = 2  # size of the squares in which boxes are drawn, relative to the crop
# Far beyond useful values, so that float32 can represent what is computed from them.
Strength = Annotated[float, pydantic.Field(ge=0, le=1000)]
Ratio = Annotated[float, pydantic.Field(ge=1e-3, le=1000)]


class CenterCrop(StrictModel):
    """Center crop as in evaluation, mirrored with probability `flip`."""

    kind: Literal["center"]
    flip: Fraction = 0.0


class PadCrop(StrictModel):
    """Random crop of the center crop after padding it with `pad` black pixels on each side.

    Source: He et al. (CVPR 2016), section 4.2. The starred rows of GM-SOP's Table 3 use the
    last two options: with `doubled`, an epoch has every image and its mirror image; `held_out`
    images are padded and cropped, too.
    """

    kind: Literal["pad-crop"]
    flip: Fraction = 0.0
    pad: Annotated[int, pydantic.Field(ge=1)] = 4
    doubled: bool = False
    held_out: bool = False


class BoxCrop(StrictModel):
    """Settings of the augmentations that crop a random box and resize it.

    `crop` is the side of the training images in pixels, by default `preprocess.crop`.
    """

    flip: Fraction = 0.0
    crop: Side | None = None


class RandomResizedCrop(BoxCrop):
    """Box of random area (`scale`, a fraction of the image) and aspect ratio (`ratio`, width / height).

    Source: Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015); drawn as torchvision
    does.
    """

    kind: Literal["random-resized-crop"]
    scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    ratio: tuple[Ratio, Ratio] = (0.75, 4 / 3)

    def box(self, size: tuple[int, int], crop: int, random: Random) -> Box:  # noqa: ARG002
        """Draw a box in source pixels; if ten do not fit, return the largest centered one of valid ratio.

        *size* is that of the image; *crop* has no effect.
        """
        image_width, image_height = size
        log_ratios = [math.log(bound) for bound in self.ratio]

        for _ in range(10):
            area = image_width * image_height * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(*log_ratios))
            width = round(math.sqrt(area * ratio))
            height = round(math.sqrt(area / ratio))
            if 0 < width <= image_width and 0 < height <= image_height:
                left = random.randint(0, image_width - width)
                top = random.randint(0, image_height - height)
                return left, top, left + width, top + height

        # The largest box in the middle whose ratio is the valid one nearest to the image's.
        ratio = min(max(image_width / image_height, self.ratio[0]), self.ratio[1])
        width = min(image_width, max(1, round(image_height * ratio)))
        height = min(image_height, max(1, round(image_width / ratio)))
        left = (image_width - width) // 2
        top = (image_height - height) // 2

        return left, top, left + width, top + height


class RandomSide(BoxCrop):
    """Resize of the shorter side to a random length in `sides`, then a random crop.

    Source: He et al. (CVPR 2016), section 3.4; DSoP, section V-B.
    """

    kind: Literal["random-side"]
    sides: tuple[Side, Side] = (256, 512)

    def box(self, size: tuple[int, int], crop: int, random: Random) -> Box:
        """Draw the square in source pixels that becomes the crop after the resize to a random side.

        *size* is that of the image.
        """
        width, height = size
        side = max(crop, random.randint(*sorted(self.sides)))  # the crop must fit
        window = crop * (min(width, height) / side)  # side of the crop, in source pixels
        left = random.random() * (width - window)
        top = random.random() * (height - window)
        # `min`, because of rounding errors.
        return (left, top, min(width, left + window), min(height, top + window))


Augmentation = Annotated[
    CenterCrop | PadCrop | RandomResizedCrop | RandomSide, pydantic.Field(discriminator="kind")
]


class ColorConfig(StrictModel):
    """AlexNet's random shift of the color.

    `lighting` is the standard deviation of the multiples of ImageNet's three principal color
    components that are added to all pixels. Source: Krizhevsky et al. (NIPS 2012), section 4.1,
    which uses 0.1.
    """

    lighting: Strength = 0.0

    def __call__(self, array: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Change the colors of the (H, W, 3) uint8 *array*; depends on *seed* only."""
        if not self.lighting:
            return array
        multiples = np.random.default_rng(seed).normal(0.0, self.lighting, 3) * COLOR_DEVIATIONS
        shifted = np.rint(array + 255 * (COLOR_COMPONENTS @ multiples))
        return np.clip(shifted, 0, 255).astype(np.uint8)


NO_COLOR_SHIFT = ColorConfig()


class Augmentations(StrictModel):
    """How training images are changed. These settings are keys of the recipe itself, not of a table.

    `augment` and `color` change single images by code of this package, the others are timm's.
    """

    augment: Augmentation
    color: ColorConfig = NO_COLOR_SHIFT
    rand_augment: RandAugment | None = None
    random_erasing: RandomErasing | None = None
    mixing: Mixing | None = None

    @property
    def num_copies(self) -> int:
        """How often an epoch has each image."""
        return 2 if isinstance(self.augment, PadCrop) and self.augment.doubled else 1

    def crop_of(self, preprocess: Preprocess) -> int:
        """Return the side of the training images in pixels."""
        crop = self.augment.crop if isinstance(self.augment, BoxCrop) else None
        return preprocess.crop if crop is None else crop

    def evaluated_images(
        self, images: LabeledImages, preprocess: Preprocess
    ) -> PreprocessedDataset:
        """Return *images* without augmentation, but padded and cropped with `PadCrop.held_out`."""
        augment = self.augment
        pad = augment.pad if isinstance(augment, PadCrop) and augment.held_out else 0
        fitted = FittedPixels(images, preprocess)
        return PreprocessedDataset(images, preprocess, pad, fitted=fitted)

    def training_images(
        self, images: LabeledImages, preprocess: Preprocess, seed: int, epoch: int
    ) -> "AugmentedDataset":
        """Return *images* with the augmentation of *epoch*; `replace` gives the data set of another epoch.

        All epochs share the pixels in memory, if their augmentation starts from fitted ones.
        """
        rules = preprocess.model_copy(update={"crop": self.crop_of(preprocess)})
        fitted = None if isinstance(self.augment, BoxCrop) else FittedPixels(images, rules)
        return AugmentedDataset(
            images,
            self.augment,
            rules,
            seed,
            epoch,
            self.color,
            self.rand_augment,
            fitted=fitted,
        )

    def change_batch(
        self,
        images: "Tensor",
        labels: "Tensor",
        num_classes: int,
        *,
        is_multi_label: bool,
        seed: int,
    ) -> "Tensor":
        """Erase and mix the normalized *images* (B, 3, H, W) of a step in place; return their targets.

        These are the *labels*, or, if images are mixed, (B, classes). The choices depend on *seed*, the
        noise of erased pixels on torch's generator.
        """
        with seeded(seed):
            if self.random_erasing is not None:
                self.random_erasing.erase(images)
            if self.mixing is None:
                return labels
            return self.mixing.mix(images, labels, num_classes, is_multi_label=is_multi_label)


@dataclass(frozen=True, slots=True)
class AugmentedDataset(FittedDataset):
    """Augmented images of one epoch, of `preprocess.crop` x `preprocess.crop` pixels.

    Repeated uses of a sample have the indices `sample + copy * len(self)` and are augmented
    differently. If the images are doubled, every second copy is mirrored.
    """

    augmentation: Augmentation
    preprocess: Preprocess
    seed: int
    epoch: int
    color: ColorConfig = NO_COLOR_SHIFT
    rand_augment: RandAugment | None = None

    def pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Compute the augmented pixels (B, crop, crop, 3) of the images or copies at *indices*."""
        augmentation = self.augmentation
        # An index is sample + copy * len(images).
        samples = [index % len(self.images) for index in indices]
        # Random numbers of an image do not depend on its batch.
        randoms = [
            Random(derive_seed(self.seed, "augment", self.epoch, index))  # noqa: S311
            for index in indices
        ]

        # A crop of a random box is resized; other augmentations begin with the pixels of
        # evaluation.
        if isinstance(augmentation, BoxCrop):
            crops = [
                _crop_box(self.images, sample, augmentation, self.preprocess, random)
                for sample, random in zip(samples, randoms, strict=True)
            ]
            arrays = np.stack(crops)
        elif isinstance(augmentation, CenterCrop | PadCrop):
            arrays = self.fit(samples, self.preprocess)
        else:
            assert_never(augmentation)

        # Cut out a window of each, at a random place and perhaps mirrored.
        pad = 0
        is_doubled = False
        if isinstance(augmentation, PadCrop):
            pad = augmentation.pad
            is_doubled = augmentation.doubled

        windows = []
        for index, random in zip(indices, randoms, strict=True):
            top = random.randint(0, 2 * pad) if pad else 0
            left = random.randint(0, 2 * pad) if pad else 0
            copy = index // len(self.images)
            is_mirrored = copy % 2 == 1 if is_doubled else random.random() < augmentation.flip
            windows.append(Window(top, left, is_mirrored))

        arrays = crop_padded(arrays, pad, windows)
        if self.rand_augment is not None:
            arrays = self._rand_augment(arrays, indices, self.rand_augment)
        if self.color == NO_COLOR_SHIFT:
            return arrays

        # Colors are shifted by random numbers of their own.
        seeds = (derive_seed(self.seed, "color", self.epoch, index) for index in indices)
        return np.stack(
            [self.color(array, seed) for array, seed in zip(arrays, seeds, strict=True)]
        )

    def _rand_augment(
        self, arrays: NDArray[np.uint8], indices: Sequence[int], change: RandAugment
    ) -> NDArray[np.uint8]:
        """Make the random *change* of each of *arrays* (B, crop, crop, 3), the images at *indices*."""
        changed = []
        for array, index in zip(arrays, indices, strict=True):
            seed = derive_seed(self.seed, "rand augment", self.epoch, index)
            changed.append(change(array, self.preprocess, seed))
        return np.stack(changed)


def _crop_box(
    images: LabeledImages,
    index: int,
    augmentation: RandomResizedCrop | RandomSide,
    rules: Preprocess,
    random: Random,
) -> NDArray[np.uint8]:
    """Crop a random box of an image and resize it.

    With the fit "crop", the box is chosen by the size in the header of the file. Otherwise it is a
    box of the square that evaluation sees.
    """
    size = (rules.crop, rules.crop)

    def choose_view(image_size: tuple[int, int]) -> View:
        return View(augmentation.box(image_size, rules.crop, random), size)

    if rules.fit == "crop":
        return images.preprocess(index, rules, choose_view)
    # The square that evaluation sees, but larger, so that a small box of it keeps its details.
    enlarged = rules.model_copy(
        update={"crop": SQUARE * rules.crop, "resize": SQUARE * rules.resize}
    )

    square = Image.fromarray(images.preprocess(index, enlarged))
    box = choose_view(square.size).box
    return np.asarray(resize_by_rules(square, size, rules, box), dtype=np.uint8)
