"""The sparsity-constrained gate: which K of N components answer for an image, and how loud.

Paper: Wang et al., GM-SOP (NeurIPS 2018), Eqs. (2) and (3), after Shazeer et al., "Outrageously large
neural networks" (SG-MoE, ICLR 2017).
Letters: B images, N components, K kept, f the gate's feature of D numbers.

H = Wg f + gamma softplus(Wn f), gamma from N(0, 1) in training and 0 afterwards; the K largest H are
kept and share a softmax. Eq. (2) writes gamma without an index and the released code draws one per
image (`noise_per="image"`); SG-MoE draws one per component (`"component"`).

The released code gives a kept component whose H is exactly 0 no weight; Eq. (3) gives it its share,
and so does this file. Where H ties, the lower index is kept: the released code draws at random there.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.layers.covariance import at_least_float32, without_autocast
from sopdeploy.layers.distributed import Rows, sum_over_ranks
from sopdeploy.layers.export_hints import ExportHints

NoisePer = Literal["image", "component"]


class GateNoise(nn.Module):
    """gamma softplus(Wn f): (B, D) to (B, N). Lives in training only.

    `rows` says which part of a step's batch is here, where it is spread over processes.
    """

    def __init__(self, features: int, components: int, per: NoisePer) -> None:
        super().__init__()
        self.per = per
        self.rows = Rows()
        self.weight = constant_rows(components, features)

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Return the perturbation of the gate's logits, freshly drawn."""
        with without_autocast(feature_BD):
            size_BN = F.softplus(F.linear(at_least_float32(feature_BD), self.weight))
            shape = size_BN[:, :1] if self.per == "image" else size_BN
            return self.rows.draw(shape.detach(), Tensor.normal_) * size_BN


class SparseGate(nn.Module, ExportHints):
    """Feature map in, weights (B, N) out: K of them positive and summing to 1, the others 0.

    *feature* turns the feature map into f, of D numbers: the prediction layers and a pooling.
    """

    keep_float32 = True
    is_gate = True

    def __init__(self, feature: nn.Module, features: int, components: int, chosen: int) -> None:
        super().__init__()
        self.feature = feature
        self.chosen = chosen
        self.weight = constant_rows(components, features)

    def logits(self, feature_BD: Tensor) -> Tensor:
        """Return Wg f as (B, N), in float32 at least: half precision would choose others."""
        with without_autocast(feature_BD):
            return F.linear(at_least_float32(feature_BD), self.weight)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the weights without noise."""
        return keep_largest(self.logits(self.feature(features_BCHW)), self.chosen)

    def extra_repr(self) -> str:
        """Name K and N in the printed module."""
        return f"chosen={self.chosen}, components={len(self.weight)}"


def constant_rows(components: int, features: int) -> nn.Parameter:
    """Return (N, D) weights of 1 / D, the released code's start: all components tie at first."""
    return nn.Parameter(torch.full((components, features), 1.0 / features))


def rank(logits_BN: Tensor) -> Tensor:
    """Return each logit's place in its row as int32 (B, N): 0 is the largest, ties by lower index.

    By comparing all pairs, N^2 of them, so that no runtime's sort has a say in how ties break and
    the exported graph has no data-dependent shape.
    """
    own_BN1, other_B1N = logits_BN.unsqueeze(2), logits_BN.unsqueeze(1)
    index_N = torch.arange(logits_BN.shape[1], device=logits_BN.device)
    earlier_NN = index_N.unsqueeze(0) < index_N.unsqueeze(1)
    ahead_BNN = (other_B1N > own_BN1) | ((other_B1N == own_BN1) & earlier_NN)
    return ahead_BNN.sum(dim=2, dtype=torch.int32)


def keep_largest(logits_BN: Tensor, chosen: int) -> Tensor:
    """Return the softmax over the *chosen* largest logits of each row, 0 elsewhere: (B, N)."""
    return logits_BN.masked_fill(rank(logits_BN) >= chosen, float("-inf")).softmax(dim=1)


def balance_loss(weights_BN: Tensor, alpha: float) -> Tensor:
    """Return alpha / S times (std / mean)^2 of the summed weights of all S images of the step.

    The sum runs over all ranks where `torch.distributed` is initialised, so that the loss does not
    depend on how a batch is spread. Its gradient is whole when the ranks' gradients are averaged, each
    weighted by its share of the images. alpha is divided by S because the released trainer sums the
    cross entropy over the batch and then divides every gradient by its size: beside a mean cross
    entropy Eq. (4) weighs alpha / S, 0.39 for the paper's 100 and 256.
    """
    images = weights_BN.new_full((1,), weights_BN.shape[0])
    summed = sum_over_ranks(torch.cat([weights_BN.sum(dim=0), images]))
    load_N, images = summed[:-1], summed[-1].detach()
    return alpha / images * (load_N.var(correction=1) / load_N.mean().square())
