"""Bilinear pooling: B-CNN, improved B-CNN, the Gaussian embedding of G2DeNet, low-rank bilinear pooling.

Papers: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition" (ICCV 2015); Lin and Maji,
"Improved Bilinear Pooling with CNNs" (BMVC 2017). Letters: B images, C channels, M positions.
"""

from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.config import Count
from sopdeploy.layers.covariance import covariance, scaled
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_signed_root
from sopdeploy.layers.spectral import NO_ROOT_FORM, MatrixRootConfig, square_root


class Bilinear(GlobalPooling):
    """Pool (B, C, H, W) maps to the signed square root of X X^T / M, a vector (B, C^2) of unit length."""

    def __init__(self, _config: PoolingConfig, channels: int) -> None:
        super().__init__()
        self.out_features = channels**2

    def matrix(self, features: Tensor) -> Tensor:
        """Compute X X^T / M (B, C, C) of *features* (B, C, H, W)."""
        return covariance(scaled(features))

    def pool(self, features: Tensor) -> Tensor:
        """Compute the (B, C^2) vector of *features* (B, C, H, W)."""
        return unit_signed_root(self.matrix(features).flatten(start_dim=1))


class BilinearConfig(PoolingConfig):
    """Options of B-CNN: none."""

    layer = Bilinear
    kind: Literal["bcnn"] = "bcnn"


class ImprovedBilinear(Bilinear):
    """Improved B-CNN: `Bilinear` of the matrix square root of X X^T / M."""

    def __init__(self, config: "ImprovedBilinearConfig", channels: int) -> None:
        super().__init__(config, channels)
        self.config = config
        self.not_exportable = NO_ROOT_FORM if config.root == "eigen" else None

    def matrix(self, features: Tensor) -> Tensor:
        """Compute the square root (B, C, C) of X X^T / M."""
        return square_root(super().matrix(features), self.config)


class ImprovedBilinearConfig(PoolingConfig, MatrixRootConfig):
    """Options of improved B-CNN: the matrix square root and its gradient; the paper compares all three."""

    layer = ImprovedBilinear
    kind: Literal["improved-bcnn"] = "improved-bcnn"


class GaussianEmbedding(GlobalPooling):
    """Pool (B, C, H, W) maps to G2DeNet's embedding of a Gaussian distribution, (B, (C + 1)^2)."""

    def __init__(self, config: "GaussianConfig", channels: int) -> None:
        super().__init__()
        self.config = config
        self.not_exportable = NO_ROOT_FORM if config.root == "eigen" else None
        self.out_features = (channels + 1) ** 2

    def pool(self, features: Tensor) -> Tensor:
        """Compute the square root of [[Sigma + mu mu^T, mu], [mu^T, 1]] as a vector (B, (C + 1)^2).

        Sigma + mu mu^T is X X^T / M.
        """
        mean_B1C = features.mean(dim=(2, 3))[:, None, :]
        left_BDC = torch.cat([covariance(scaled(features)), mean_B1C], dim=1)
        right_BD1 = F.pad(mean_B1C, (0, 1), value=1.0).transpose(1, 2)
        embedded_BDD = torch.cat([left_BDC, right_BD1], dim=2)
        return square_root(embedded_BDD, self.config).flatten(start_dim=1)


class GaussianConfig(PoolingConfig, MatrixRootConfig):
    """Options of G2DeNet: the matrix square root, which is exact in the paper."""

    layer = GaussianEmbedding
    kind: Literal["g2denet"] = "g2denet"


class LowRankBilinear(Bilinear):
    """Reduce (B, C, H, W) maps to m channels and pool them to X X^T / M, a vector (B, m^2).

    The classifier of this vector has weight matrices of low rank.
    """

    def __init__(self, config: "LowRankBilinearConfig", channels: int) -> None:
        super().__init__(config, config.width)
        self.config = config
        self.layer_reduce = nn.Conv2d(channels, config.width, 1, bias=False)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the bilinear matrix of the features, reduced to m channels, as a vector (B, m^2)."""
        return self.matrix(features).flatten(start_dim=1)

    def classifier(self, num_classes: int) -> nn.Module:
        """Build the low-rank classifier."""
        return LowRankClassifier(self.config, num_classes)


class LowRankClassifier(nn.Module):
    """Classify a bilinear vector (B, m^2): (B, K) logits <W_k, S> + b_k with W_k of rank r."""

    signs: Tensor

    def __init__(self, config: "LowRankBilinearConfig", num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.in_features = config.width**2
        self.factors = nn.Linear(config.width, num_classes * config.rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        half = config.rank // 2
        self.register_buffer("signs", torch.tensor([1.0] * half + [-1.0] * half), persistent=False)

    def forward(self, vector: Tensor) -> Tensor:
        """Compute the sum of u^T S u over each class's factors u, with their signs."""
        matrix_Bmm = vector.view(-1, self.config.width, self.config.width)
        forms_BF = (self.factors(matrix_Bmm) * self.factors.weight.T).sum(dim=1)
        forms_BKr = forms_BF.view(-1, len(self.bias), self.config.rank)
        return (forms_BKr * self.signs).sum(dim=2) + self.bias


class LowRankBilinearConfig(PoolingConfig):
    """Options: `width` is m, the reduced channels, `rank` is r, the rank of a class's weight matrix."""

    layer = LowRankBilinear
    kind: Literal["low-rank-bilinear"] = "low-rank-bilinear"
    width: Count = 100
    rank: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] = 8
