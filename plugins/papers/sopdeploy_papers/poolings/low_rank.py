"""Low-rank bilinear pooling: a bilinear classifier whose weight matrices have a low rank.

Paper: Kong and Fowlkes, "Low-rank Bilinear Pooling for Fine-Grained Classification" (CVPR
2017). The classifier needs the number of classes, so this is a network, not only a pooling.
Letters: B images, C channels, M positions, m reduced channels, K classes, r rank, F = K r
factors.
"""

import math
from typing import Annotated, Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.pooling.base import GapConfig, GlobalPooling, unit_signed_root
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.backbones.alexnet_vgg import VGG, VGGConfig

Width = Annotated[int, pydantic.Field(ge=1)]


class LowRankConfig(VGGConfig):
    """VGG-16 with `width` reduced channels (m) and `rank` factors per class (r).

    The defaults are those of the paper: 100^2 is the printed 10K. With `signed_root`, the
    classifier reads the element-wise signed root of the pooled matrix with unit length, as in
    the released code; the paper's equations have none.
    """

    pooling: Pooling = GapConfig()
    classifier: Literal["mlp", "linear"] = "linear"
    width: Width = 100
    rank: Width = 8
    signed_root: bool = False

    @pydantic.model_validator(mode="after")
    def _check_fixed(self) -> Self:
        if self.pooling != GapConfig() or self.classifier != "linear":
            raise ValueError(
                "low-rank bilinear pooling has its own pooling and classifier; set neither"
            )
        return self


class ReducedBilinear(GlobalPooling):
    """Reduce (B, C, H, W) maps to m channels and pool them to X X^T / M, a vector (B, m^2)."""

    def __init__(self, channels: int, width: int, *, signed_root: bool = False) -> None:
        super().__init__()
        self.signed_root = signed_root
        self.layer_reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.out_features = width**2

    def pool(self, features: Tensor) -> Tensor:
        """Compute the second moments of a map (B, m, H, W), or their signed roots, as a vector (B, m^2)."""
        x_BmM = features.flatten(start_dim=2) / math.sqrt(features.shape[2] * features.shape[3])
        vector = (x_BmM @ x_BmM.transpose(1, 2)).flatten(start_dim=1)
        return unit_signed_root(vector) if self.signed_root else vector


class LowRankClassifier(nn.Linear, ExportHints):
    """Classify a bilinear vector (B, m^2): (B, K) logits <W_k, S> + b_k; `weight` (F, m) has all factors.

    W_k is the sum of r / 2 squares u u^T minus the sum of r / 2 others.
    """

    keep_float32 = True
    signs: Tensor

    def __init__(self, width: int, rank: int, num_classes: int) -> None:
        super().__init__(width, num_classes * rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("signs", torch.ones(rank), persistent=False)
        self.signs[rank // 2 :] = -1.0

    def forward(self, vector: Tensor) -> Tensor:
        """Compute the sum of u^T S u over each class's factors u, with their signs."""
        matrix_Bmm = vector.view(-1, self.in_features, self.in_features)
        forms_BF = ((matrix_Bmm @ self.weight.T) * self.weight.T).sum(dim=1)
        forms_BKr = forms_BF.view(-1, len(self.bias), len(self.signs))
        return (forms_BKr * self.signs).sum(dim=2) + self.bias


class LowRankVGG(VGG):
    """VGG-16 with low-rank bilinear pooling and its classifier; starts from the weights of VGG-16."""

    config: LowRankConfig

    def __init__(self, config: LowRankConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        channels = self.pooling.out_features  # of the average pooling
        self.pooling = ReducedBilinear(channels, config.width, signed_root=config.signed_root)
        self.classifier = LowRankClassifier(config.width, config.rank, num_classes)

    def logits_layer(self) -> None:
        """Return none: no linear layer computes the logits."""
