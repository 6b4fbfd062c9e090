"""Normalization of uint8 images to float32 maps, the same module in training and export."""

import torch
from torch import Tensor, nn

from sopdeploy.images.preprocess import Preprocess

IMAGES_FORMAT = "images_format"  # attribute of a network


class Normalize(nn.Module):
    """Convert images (B, H, W, 3) uint8 to (B, 3, H, W) float32 with the mean and std of *preprocess*.

    The result has the layout *memory_format*, on which depends whether a network can `view` its
    features. Mean and standard deviation become one multiplication and one addition per
    channel: (x / 255 - mean) / std = x * scale + offset.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, preprocess: Preprocess, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.memory_format = memory_format
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        self.register_buffer("scale", (1.0 / (255.0 * std)).float().reshape(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).float().reshape(1, 3, 1, 1))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Compute the normalized images, channels first; C is 3."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).contiguous(
            memory_format=self.memory_format
        )
        return images_BCHW.float() * self.scale + self.offset


def images_format(network: nn.Module) -> torch.memory_format:
    """Return the layout of the images that *network* is trained with.

    It is recorded in the attribute `images_format` of a module; without it, it is that of the
    weights.
    """
    for module in network.modules():
        recorded = vars(module).get(IMAGES_FORMAT)
        if isinstance(recorded, torch.memory_format):
            return recorded

    # A network that was not trained here: the layout of its weights tells.
    for weight in network.parameters():
        is_channels_last = weight.dim() == 4 and weight.is_contiguous(
            memory_format=torch.channels_last
        )
        # A kernel of one position has both layouts.
        if is_channels_last and not weight.is_contiguous():
            return torch.channels_last

    return torch.contiguous_format
