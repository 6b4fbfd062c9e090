"""Low-rank bilinear pooling: a bilinear classifier whose weight matrices have a low rank.

Paper: Kong and Fowlkes, "Low-rank Bilinear Pooling for Fine-Grained Classification" (CVPR 2017). The
classifier needs the number of classes, so this is a network, not only a pooling.
Letters: B images, C channels, M positions, m reduced channels, K classes, r rank, F = K r factors.
"""

import math

import torch
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.pooling.base import GlobalPooling
from sopdeploy.models.registry import create_model
from sopdeploy.models.user_network import Source, UserNetwork

WIDTH, RANK = 100, 8  # m and r of the paper: 100^2 is the printed 10K


class ReducedBilinear(GlobalPooling):
    """Reduce (B, C, H, W) maps to m channels and pool them to X X^T / M, a vector (B, m^2)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layer_reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.out_features = width**2

    def pool(self, features: Tensor) -> Tensor:
        """Compute the second moments of a map (B, m, H, W) as a vector (B, m^2)."""
        x_BmM = features.flatten(start_dim=2) / math.sqrt(features.shape[2] * features.shape[3])
        return (x_BmM @ x_BmM.transpose(1, 2)).flatten(start_dim=1)


class LowRankClassifier(nn.Module, ExportHints):
    """Classify a bilinear vector (B, m^2): (B, K) logits <W_k, S> + b_k.

    W_k is the sum of r / 2 squares u u^T minus the sum of r / 2 others.
    """

    keep_float32 = True
    signs: Tensor

    def __init__(self, width: int, rank: int, num_classes: int) -> None:
        super().__init__()
        self.width = width
        self.factors = nn.Linear(width, num_classes * rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("signs", torch.ones(rank), persistent=False)
        self.signs[rank // 2 :] = -1.0

    def forward(self, vector: Tensor) -> Tensor:
        """Compute the sum of u^T S u over each class's factors u, with their signs."""
        matrix_Bmm = vector.view(-1, self.width, self.width)
        forms_BF = (self.factors(matrix_Bmm) * self.factors.weight.T).sum(dim=1)
        forms_BKr = forms_BF.view(-1, len(self.bias), len(self.signs))
        return (forms_BKr * self.signs).sum(dim=2) + self.bias


def low_rank_vgg16(num_classes: int) -> nn.Module:
    """Build VGG-16 with batch norm, low-rank bilinear pooling and its classifier."""
    network = create_model("vgg16-bn", num_classes=num_classes, pooling="gap", classifier="linear")
    channels = network.num_features()
    network.pooling = ReducedBilinear(channels, WIDTH)
    network.classifier = LowRankClassifier(WIDTH, RANK, num_classes)
    return network


class LowRankVGG(UserNetwork):
    """The network of `low_rank_vgg16`, as the catalog calls it."""

    def __init__(self, config: StrictModel, num_classes: int) -> None:
        super().__init__(config, num_classes, Source(low_rank_vgg16, taps=(), image_size=224))
