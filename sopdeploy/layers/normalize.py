"""Normalization of uint8 images to float32 maps, the same module in training and export."""

import torch
from torch import Tensor, nn

from sopdeploy.images.preprocess import GRAY_WEIGHTS, Preprocess

IMAGES_FORMAT = "images_format"  # attribute of a network


class Normalize(nn.Module):
    """Convert images (B, H, W, 3) uint8 RGB to (B, C, H, W) float32 by the channels, mean and std of *preprocess*.

    C is 3, in the order of colors of *preprocess*, or 1 for gray images. The result has the layout
    *memory_format*, on which depends whether a network can `view` its features. Mean and standard
    deviation become one multiplication and one addition per channel: (x / 255 - mean) / std = x *
    scale + offset. In gray images, scale also has the weights of the colors, whose products are
    added up. The sum is not rounded to a whole gray level.
    """

    scale: Tensor
    offset: Tensor
    order: Tensor

    def __init__(self, preprocess: Preprocess, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.memory_format = memory_format
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        scale = 1.0 / (255.0 * std)
        self.is_gray = preprocess.channels == 1
        if self.is_gray:
            scale = scale * torch.tensor(GRAY_WEIGHTS, dtype=torch.float64)
        # Only a network that takes blue first has this buffer.
        self.is_bgr = preprocess.color_order == "BGR"
        if self.is_bgr:
            self.register_buffer("order", torch.tensor([2, 1, 0]))
        self.register_buffer("scale", scale.float().reshape(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).float().reshape(1, -1, 1, 1))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Compute the normalized images, channels first."""
        if self.is_bgr:
            images_BHWC = images_BHWC.index_select(3, self.order)
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).contiguous(
            memory_format=self.memory_format
        )
        scaled_BCHW = images_BCHW.float() * self.scale
        if self.is_gray:
            scaled_BCHW = scaled_BCHW.sum(dim=1, keepdim=True)
        return scaled_BCHW + self.offset


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
