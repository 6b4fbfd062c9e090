"""Mixup and cutmix: each picture of a batch is blended with its neighbour, and so is its class.

Sources: Zhang et al., "mixup" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019); as torchvision computes them.
"""

import torch
from torch import Tensor
from torchvision.transforms import v2

from sopdeploy.frozen import Frozen, NotNegative


class Mix(Frozen):
    """`mixup` and `cutmix` are the alphas of their Beta distributions, 0 for never.

    Where both are set, each batch gets one of them with equal chance. The neighbour of the first picture is
    the last one, so that a batch of any size will do.
    """

    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

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
