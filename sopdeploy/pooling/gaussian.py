"""G2DeNet: a Gaussian, mean and covariance in one matrix, embedded by its square root.

Paper: Wang et al., "G2DeNet: Global Gaussian Distribution Embedding Network" (CVPR 2017), Eq. (6):
[[Sigma + mu mu^T, mu], [mu^T, 1]]^(1/2). Letters: B images, C channels, M positions.

The whole symmetric matrix is the vector: 513^2 = 263169 elements on 512 channels, the published "263K".
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sopdeploy.pooling.base import GlobalPooling, PoolingConfig
from sopdeploy.pooling.bilinear import bilinear
from sopdeploy.pooling.matrix_root import RootConfig, square_root


class GaussianConfig(PoolingConfig, RootConfig):
    """How the matrix square root is taken; the paper's is exact."""

    kind: Literal["g2denet"] = "g2denet"

    def build(self, channels: int) -> GlobalPooling:
        """Return the layer; it has no weights."""
        return GaussianEmbedding(self, channels)


class GaussianEmbedding(GlobalPooling):
    """Feature map (B, C, H, W) in, the embedded Gaussian (B, (C + 1)^2) out."""

    def __init__(self, config: GaussianConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.not_exportable = config.not_exportable
        self.out_features = (channels + 1) ** 2

    def pool(self, features: Tensor) -> Tensor:
        """Return the vector; Sigma + mu mu^T is X X^T / M."""
        mean_B1C = features.mean(dim=(2, 3))[:, None, :]
        left_BDC = torch.cat([bilinear(features), mean_B1C], dim=1)
        right_BD1 = F.pad(mean_B1C, (0, 1), value=1.0).transpose(1, 2)
        embedded_BDD = torch.cat([left_BDC, right_BD1], dim=2)
        return square_root(embedded_BDD, self.config).flatten(start_dim=1)
