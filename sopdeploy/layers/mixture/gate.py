"""Sparse gate: select K of N components per image and compute their weights.

Paper: Wang et al., GM-SOP (NeurIPS 2018), Eqs. (2) and (3), after Shazeer et al., "Outrageously large
neural networks" (SG-MoE, ICLR 2017).
Letters: B images, N components, K kept, f the gate's feature of D numbers.

H = Wg f + gamma softplus(Wn f), gamma from N(0, 1) in training and 0 afterwards; the weights are the softmax
of the K largest H. Eq. (2) defines H_i for one component and takes its noise from SG-MoE, which draws it for
each component: `noise_per="component"`. The released code draws one number per image (`"image"`), with which
Figure 2 is not reproduced: `benchmarks/gate_usage.py` measures both.

The released code gives a kept component whose H is exactly 0 no weight; Eq. (3) and this module give it the
softmax weight. Where H ties, the lower index is kept; the released code draws at random.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.layers.covariance import at_least_float32, without_autocast
from sopdeploy.layers.distributed import sum_over_ranks
from sopdeploy.layers.export_hints import ExportHints

NoisePer = Literal["image", "component"]


class GateNoise(nn.Module):
    """Noise gamma softplus(Wn f) (B, N) of the gate, computed from f (B, D); only for training."""

    def __init__(self, features: int, components: int, per: NoisePer) -> None:
        super().__init__()
        self.per = per
        self.weight = nn.Parameter(torch.full((components, features), 1.0 / features))

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Draw the noise (B, N) that is added to the gate's logits."""
        with without_autocast(feature_BD):
            scale_BN = F.softplus(F.linear(at_least_float32(feature_BD), self.weight))
            like = scale_BN[:, :1] if self.per == "image" else scale_BN
            return torch.randn_like(like) * scale_BN


class SparseGate(nn.Module, ExportHints):
    """Map a feature map to weights (B, N): K of them positive with sum 1, the others 0.

    *feature* computes f (B, D) from the feature map with the prediction layers and a pooling. All elements of
    Wg and Wn start as 1 / D, as in the released code, so all components have equal logits at first.
    """

    keep_float32 = True
    is_gate = True

    def __init__(self, feature: nn.Module, features: int, components: int, chosen: int) -> None:
        super().__init__()
        self.feature = feature
        self.chosen = chosen
        self.weight = nn.Parameter(torch.full((components, features), 1.0 / features))

    def logits(self, feature_BD: Tensor) -> Tensor:
        """Compute Wg f as (B, N) in float32 or float64: half precision would select other components."""
        with without_autocast(feature_BD):
            return F.linear(at_least_float32(feature_BD), self.weight)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the weights without noise."""
        return keep_largest(self.logits(self.feature(features_BCHW)), self.chosen)


def rank(logits_BN: Tensor) -> Tensor:
    """Rank the logits of each row as int32 (B, N): 0 is the largest, ties by lower index.

    All N^2 pairs are compared, so that ties do not depend on a runtime's sort and the exported graph has no
    data-dependent shape.
    """
    own_BN1, other_B1N = logits_BN.unsqueeze(2), logits_BN.unsqueeze(1)
    index_N = torch.arange(logits_BN.shape[1], device=logits_BN.device)
    earlier_NN = index_N.unsqueeze(0) < index_N.unsqueeze(1)
    ahead_BNN = (other_B1N > own_BN1) | ((other_B1N == own_BN1) & earlier_NN)
    return ahead_BNN.sum(dim=2, dtype=torch.int32)


def keep_largest(logits_BN: Tensor, chosen: int) -> Tensor:
    """Compute the softmax over the *chosen* largest logits of each row, 0 elsewhere: (B, N)."""
    return logits_BN.masked_fill(rank(logits_BN) >= chosen, float("-inf")).softmax(dim=1)


def balance_loss(weights_BN: Tensor, alpha: float) -> Tensor:
    """Compute alpha / S times (std / mean)^2 of the summed weights of all S images: Eq. (4) divided by S.

    The sum includes all ranks where `torch.distributed` is initialized, so the loss does not depend on how a
    batch is divided. The gradient is exact when the ranks' gradients are averaged, each weighted by its
    fraction of the images.

    The released trainer sums the cross entropy over the batch and then divides every gradient by S. With a
    mean cross entropy, the weight alpha of Eq. (4) is therefore alpha / S, in the paper 100 / 256 = 0.39.
    """
    count = weights_BN.new_full((1,), weights_BN.shape[0])
    summed = sum_over_ranks(torch.cat([weights_BN.sum(dim=0), count]))
    load_N, images = summed[:-1], summed[-1].detach()
    return alpha / images * (load_N.var(correction=1) / load_N.mean().square())
