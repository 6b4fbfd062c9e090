"""A plug-in with a pooling: the generalized mean of a feature map, whose exponent is trained.

Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation" (TPAMI 2018).

pip install ".[train,cpu]" ./examples/power_mean
sopdeploy train --recipe digits-plain --set model.name=resnet8 --set model.config.pooling=power-mean
"""

import torch
from torch import nn

import sopdeploy


@sopdeploy.register_pooling
class PowerMean(nn.Module):
    """Pool (B, C, H, W) maps to (B, C): the mean of the p-th powers, and of it the p-th root.

    `power` is the exponent before training: 1 is the average, a large one the maximum.
    """

    def __init__(self, channels, power=3.0):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power))
        self.out_features = channels

    def forward(self, features):
        return features.clamp_min(1e-6).pow(self.power).mean((2, 3)).pow(1.0 / self.power)
