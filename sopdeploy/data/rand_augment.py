"""RandAugment, random erasing, mixup and CutMix, as torchvision computes them."""

from typing import Annotated

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from sopdeploy.config import NonNegative, StrictModel
from sopdeploy.images.preprocess import Preprocess


class RandAugment(StrictModel):
    """RandAugment (`ops` operations at `magnitude` 0 to 30), then random erasing with probability `erase`.

    Sources: Cubuk et al., "RandAugment" (NeurIPS 2020); Zhong et al., "Random Erasing Data Augmentation"
    (AAAI 2020). Erased boxes and borders get the mean color, which is 0 after normalization.
    """

    ops: Annotated[int, pydantic.Field(ge=0, le=10)] = 0
    magnitude: Annotated[int, pydantic.Field(ge=0, le=30)] = 9
    erase: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0

    def __call__(self, array: NDArray[np.uint8], rules: Preprocess, seed: int) -> NDArray[np.uint8]:
        """Augment the (H, W, 3) uint8 *array*; depends on *seed* only and keeps torch's random state."""
        if self.ops == 0 and self.erase == 0:
            return array
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            image = torch.from_numpy(array.copy()).permute(2, 0, 1)
            mean = [float(round(255 * value)) for value in rules.mean]
            if self.ops:
                image = v2.RandAugment(self.ops, self.magnitude, fill=mean)(image)
            if self.erase:
                image = v2.RandomErasing(self.erase, value=mean)(image)
            return image.permute(1, 2, 0).contiguous().numpy()
        finally:
            torch.set_rng_state(before)


class Mixup(StrictModel):
    """Mixup and CutMix; `mixup` and `cutmix` are the alphas of their Beta distributions, 0 disables one.

    If both are enabled, each batch uses one of them with equal probability. Each image is mixed with its
    neighbor in the batch, the first one with the last one.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0

    def __call__(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Mix float *images* (B, 3, H, W); returns them with labels (B,) or mixed labels (B, classes).

        Draws from torch's default CPU generator.
        """
        if self.mixup == 0 and self.cutmix == 0:
            return images, labels
        transform: v2.Transform = v2.MixUp(alpha=self.mixup, num_classes=classes) if self.mixup else None
        if self.cutmix and (transform is None or bool(torch.rand(()) < 0.5)):
            transform = v2.CutMix(alpha=self.cutmix, num_classes=classes)
        mixed: tuple[Tensor, Tensor] = transform(images, labels)
        return mixed
