"""Normalization of uint8 images to float32 maps, the same module in training and export."""

import torch
from torch import Tensor, nn

from sopdeploy.images.preprocess import Preprocess


class Normalize(nn.Module):
    """Convert images (B, H, W, 3) uint8 to (B, 3, H, W) float32 with the mean and std of *preprocess*.

    Mean and standard deviation become one multiplication and one addition per channel:
    (x / 255 - mean) / std = x * scale + offset.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        self.register_buffer("scale", (1.0 / (255.0 * std)).float().reshape(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).float().reshape(1, 3, 1, 1))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Compute the normalized images, channels first."""
        return images_BHWC.permute(0, 3, 1, 2).float() * self.scale + self.offset
