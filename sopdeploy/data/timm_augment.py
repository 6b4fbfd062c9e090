"""Augmentation by timm, as its training script does it: RandAugment, random erasing, Mixup and CutMix.

timm draws from the global generators of Python and numpy. `seeded` sets them for a block, so that
these choices are functions of (seed, epoch, image or step), too. timm is imported when it is used.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.base.config import Count, Fraction, StrictModel
from sopdeploy.base.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.images.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor

PositiveFraction = Annotated[float, pydantic.Field(gt=0, le=1)]
Alpha = Annotated[float, pydantic.Field(ge=0, le=100)]
TRANSLATION = 0.45  # largest shift, relative to the side of the image, as in timm's script


class RandAugment(StrictModel):
    """timm's RandAugment: changes of color and shape that are drawn for each image.

    `num_ops` changes are drawn, each is made with probability 0.5. `magnitude` is their strength,
    0 to 10, and `magnitude_std` the standard deviation of the strength. Source: Cubuk et al.
    (NeurIPS 2020).
    """

    num_ops: Count = 2
    magnitude: Annotated[int, pydantic.Field(ge=0, le=10)] = 9
    magnitude_std: Annotated[float, pydantic.Field(ge=0, le=10)] = 0.5

    def __call__(
        self, array: NDArray[np.uint8], preprocess: Preprocess, seed: int
    ) -> NDArray[np.uint8]:
        """Change the (H, W, 3) uint8 *array*; new borders have the mean color of *preprocess*."""
        name = f"rand-m{self.magnitude}-n{self.num_ops}-mstd{self.magnitude_std}-inc1"
        with seeded(seed):
            return np.asarray(
                _transform(name, preprocess.crop, preprocess.rgb_mean)(Image.fromarray(array))
            )


@cache
def _transform(name: str, crop: int, mean: tuple[float, ...]) -> Any:
    """Build timm's transform *name* for images of *crop* pixels."""
    timm_data = _import("timm.data")
    color = tuple(min(255, round(255 * value)) for value in mean)
    color *= 3 // len(color)  # of gray images, the mean has one value
    options = {"translate_const": int(TRANSLATION * crop), "img_mean": color}
    return timm_data.rand_augment_transform(name, options)


class RandomErasing(StrictModel):
    """timm's random erasing: rectangles of an image are replaced, with this `probability`.

    `mode` replaces by noise ("pixel"), by a random color ("rand") or by the mean color ("const").
    `max_count` is the largest number of rectangles. Source: Zhong et al. (AAAI 2020).
    """

    probability: PositiveFraction = 0.25
    mode: Literal["pixel", "rand", "const"] = "pixel"
    max_count: Count = 1

    def erase(self, images: "Tensor") -> None:
        """Erase in place in normalized *images* (B, 3, H, W)."""
        erasing = _import("timm.data.random_erasing").RandomErasing(
            self.probability, mode=self.mode, max_count=self.max_count, device=images.device
        )
        erasing(images)


class Mixing(StrictModel):
    """timm's Mixup and CutMix: the images of a step are mixed with others of the step, as are their labels.

    `mixup` and `cutmix` are alpha of the beta distribution of the share; 0 switches one off. A step
    is mixed with this `probability`, and if both are on, by CutMix with `switch_probability`. The
    last image of an odd number stays as it is. Sources: Zhang et al. (ICLR 2018), Yun et al. (ICCV
    2019).
    """

    mixup: Alpha = 0.8
    cutmix: Alpha = 1.0
    probability: PositiveFraction = 1.0
    switch_probability: Fraction = 0.5

    @pydantic.model_validator(mode="after")
    def _check_alpha(self) -> "Mixing":
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are 0; set one of them, or remove the table")
        return self

    def mix(
        self, images: "Tensor", labels: "Tensor", num_classes: int, *, is_multi_label: bool
    ) -> "Tensor":
        """Mix *images* (B, 3, H, W) in place; return targets (B, classes) for their *labels*.

        *labels* are class indices (B,), or (B, classes) if *is_multi_label*.
        """
        import torch  # noqa: PLC0415 - the recipe reads these settings without it

        mixup = _import("timm.data.mixup")
        options = {"num_classes": num_classes, "multi_label": is_multi_label}
        mixing = mixup.Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.probability,
            switch_prob=self.switch_probability,
            label_smoothing=0.0,  # the loss smooths
            **options,
        )

        # timm mixes an even number of images only.
        even = len(images) // 2 * 2
        _, targets = mixing(images[:even], labels[:even])
        rest = mixup.mixup_target(labels[even:], lam=1.0, smoothing=0.0, **options)
        return torch.cat([targets, rest])


def _import(module: str) -> Any:
    """Import *module* of timm."""
    return import_optional(module, "timm", ".[train]", MissingPackageError)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python and numpy, which timm's augmentation uses; restore them at the end."""
    of_python = random.getstate()
    of_numpy = np.random.get_state()  # noqa: NPY002 - timm draws from it
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
