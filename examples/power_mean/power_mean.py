"""A plug-in with a pooling: the generalized mean of a feature map, whose exponent is trained.

Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation" (TPAMI 2018).

pip install ".[train,cpu]" ./examples/power_mean
sopdeploy train --recipe digits-plain --set model.name=resnet8 --set model.config.pooling=power-mean
"""

from typing import Literal

import torch
from torch import nn

import sopdeploy
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig


class PowerMean(GlobalPooling):
    """Pool (B, C, H, W) maps to (B, C): the mean of the p-th powers, and of it the p-th root."""

    def __init__(self, config, channels):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(config.power))
        self.out_features = channels

    def pool(self, features):
        return features.clamp_min(1e-6).pow(self.power).mean((2, 3)).pow(1.0 / self.power)


class PowerMeanConfig(PoolingConfig):
    """`power` is the exponent before training: 1 is the average, a large one the maximum."""

    layer = PowerMean
    kind: Literal["power-mean"] = "power-mean"
    power: float = 3.0


sopdeploy.register_pooling(PowerMeanConfig)
