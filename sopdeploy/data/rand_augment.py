"""What training does to the cropped picture: RandAugment and random erasing, drawn for each sample.

Sources: Cubuk et al., "RandAugment" (NeurIPS 2020); Zhong et al., "Random Erasing Data Augmentation" (AAAI
2020); both as torchvision computes them.
"""

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
    """`ops` of RandAugment's operations at `magnitude` (0 to 30), then a box erased with chance `erase`.

    0 operations and chance 0 leave a picture as it is. An erased box has the mean colour, 0 after
    normalisation.
    """

    ops: Annotated[int, pydantic.Field(ge=0, le=10)] = 0
    magnitude: Annotated[int, pydantic.Field(ge=0, le=30)] = 9
    erase: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0

    def __call__(self, array: NDArray[np.uint8], rules: Preprocess, seed: int) -> NDArray[np.uint8]:
        """Return the (height, width, 3) picture, distorted as *seed* draws it."""
        if self.ops == 0 and self.erase == 0:
            return array
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            picture = torch.from_numpy(array.copy()).permute(2, 0, 1)
            mean = [float(round(255 * value)) for value in rules.mean]
            if self.ops:
                picture = v2.RandAugment(self.ops, self.magnitude, fill=mean)(picture)
            if self.erase:
                picture = v2.RandomErasing(self.erase, value=mean)(picture)
            return picture.permute(1, 2, 0).contiguous().numpy()
        finally:
            torch.set_rng_state(before)


class Mixup(StrictModel):
    """`mixup` and `cutmix` are the alphas of their Beta distributions, 0 for never.

    Where both are set, each batch gets one of them with equal chance. The neighbour of the first picture is
    the last one, so that a batch of any size will do.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0

    def __call__(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return float *images* (B, 3, H, W) and what to learn: classes (B,) or their shares (B, classes).

        Draws from torch's generator of the CPU.
        """
        if self.mixup == 0 and self.cutmix == 0:
            return images, labels
        use_cutmix = self.mixup == 0 or (self.cutmix > 0 and bool(torch.rand(()) < 0.5))
        way = (
            v2.CutMix(alpha=self.cutmix, num_classes=classes)
            if use_cutmix
            else v2.MixUp(alpha=self.mixup, num_classes=classes)
        )
        mixed: tuple[Tensor, Tensor] = way(images, labels)
        return mixed
