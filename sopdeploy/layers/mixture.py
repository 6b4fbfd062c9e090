"""A mixture: N poolings of one feature map, each after its own 1x1 convolutions, and the gate that keeps K.

Papers: Wang et al., GM-SOP (NeurIPS 2018), Eqs. (1) to (4) and section 2.2, after Shazeer et
al., "Outrageously large neural networks" (SG-MoE, ICLR 2017). Letters: B images, C channels, H
height, W width, M positions, N components, K kept, D length of a pooled vector; o outputs, i
inputs and c channels of a convolution; f is the gate's feature.

Parametric SR-SOP is two 1x1 convolutions on the channels, then SR-SOP. Eq. (6) writes it
without centering; the paper's text and the released code run centered SR-SOP (Eq. 5) after the
convolutions. The released code has a ReLU after each and neither bias nor batch norm; Eq. (6)
has no ReLU. The ReLU is right, because Table 3 distinguishes GM-GAP from a mixture of linear
experts (SG-MoE).

All weights of a step are one (N, out, in) tensor. So every parameter has a gradient in every
step, zero for a component that no image selected, which data-parallel training needs.

A mixture of K of N has three forms with equal results: `forward` evaluates all components,
`routed_sum` each one on its images, and `gathered_sum`, the form of an exported graph, those of
each image by their weights.

The gate computes H = Wg f + gamma softplus(Wn f), gamma from N(0, 1) in training and 0
afterwards; the weights are the softmax of the K largest H. Eq. (2) defines H_i for one
component and takes its noise from SG-MoE, which draws it for each component:
`noise_per="component"`. The released code draws one number per image (`"image"`), with which
Figure 2 is not reproduced (docs/second-order.md).

The released code gives a kept component whose H is exactly 0 no weight; Eq. (3) and this module
give it the softmax weight. Where H ties, the lower index is kept; the released code draws at
random.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from sopdeploy.layers.covariance import at_least_float32, check_channels, without_autocast
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzConfig, covariance_root

PAPER_ALPHA = 100.0
PAPER_BATCH = 256  # images
ComponentKind = Literal["gap", "sop", "linear"]
NoisePer = Literal["image", "component"]


class Components(nn.Module):
    """Map (B, C, H, W) features to every component's vector (B, N, D), or with weights (B, N) to their sum.

    A component of the kind "gap" is 1x1 convolutions to *widths* channels, each with ReLU, and
    global average; "sop" is parametric SR-SOP with the configuration *root*; "linear" is linear
    layers with bias on the averaged features, the expert of SG-MoE. Without *relu*, convolutions are
    projections.

    Args:
        kind: "gap", "sop" or "linear".
        channels: C.
        widths: Channels of the 1x1 convolutions or linear layers of each component.
        components: N.
        evaluated: Number of components that a routed mixture evaluates per image; `macs` counts these.
        root: The matrix square root of "sop".
        relu: Whether each convolution is followed by ReLU.

    Raises:
        ConfigError: `forward` gets a map with another number of channels.

    Examples:
        >>> from sopdeploy.layers import Components, ISqrtCov, NewtonSchulzConfig, SparseGate
        >>> mixture = Components(
        ...     "sop", 64, (32,), components=4, evaluated=2, root=NewtonSchulzConfig()
        ... )
        >>> gate = SparseGate(ISqrtCov(64), length=2080, components=4, chosen=2)
        >>> features = torch.rand(2, 64, 7, 7)
        >>> mixture(features, gate(features)).shape
        torch.Size([2, 528])
    """

    def __init__(
        self,
        kind: ComponentKind,
        channels: int,
        widths: tuple[int, ...],
        *,
        components: int,
        evaluated: int,
        root: NewtonSchulzConfig,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.components = components
        self.evaluated = evaluated

        self.is_linear = kind == "linear"
        # (N, out, in); each convolution reads the output of the previous one
        self.weights = nn.ParameterList(
            torch.randn(components, outputs, inputs) * math.sqrt(2.0 / inputs)
            for inputs, outputs in pairwise((channels, *widths))
        )

        # Convolutions with ReLU have no bias, as in GM-SOP's code
        biased = widths if self.is_linear else ()
        self.biases = nn.ParameterList(torch.zeros(components * outputs) for outputs in biased)

        self.before = nn.AdaptiveAvgPool2d(1) if self.is_linear else nn.Identity()
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.after, self.out_features = build_pooling(
            kind, widths[-1] if widths else channels, root
        )

    def forward(
        self,
        features_BCHW: Tensor,
        weights_BN: Tensor | None = None,
        *,
        gather: bool = False,
        route: bool = False,
    ) -> Tensor:
        """Return the components' vectors (B, N, D), or with *weights_BN* the sum (B, D) of Eq. (1).

        All components are evaluated on all images; no shape depends on the data. With *gather*,
        the sum is computed by `gathered_sum`, from some components of each image, where that is
        faster. With *route*, it is computed by `routed_sum`. Raises `ConfigError` for another
        number of channels.
        """
        check_channels(self, features_BCHW, self.channels)
        if route and weights_BN is not None:
            return self.routed_sum(features_BCHW, weights_BN)
        if gather and weights_BN is not None and self.gathering_is_faster(features_BCHW):
            return self.gathered_sum(features_BCHW, weights_BN)

        # All components run as groups of one convolution.
        x = self.before(features_BCHW)

        for step, weight_Noi in enumerate(self.weights):
            # In the first step, all components read the same features, so that there is one
            # group.
            groups = 1 if step == 0 else self.components
            kernel = weight_Noi.flatten(end_dim=1).unsqueeze(2).unsqueeze(3)  # (N o, i, 1, 1)
            if self.is_linear:
                x = F.conv2d(x, kernel, self.biases[step], groups=groups)
            else:
                x = self.activation(F.conv2d(x, kernel, groups=groups))

        # Pool each component's map, then sum the vectors with the weights of their image.
        maps = x.unflatten(1, (self.components, -1)).flatten(end_dim=1)  # (B N, c, H, W)
        pooled_BND: Tensor = self.after(maps).unflatten(0, (-1, self.components))
        if weights_BN is None:
            return pooled_BND
        return (pooled_BND * weights_BN.unsqueeze(2)).sum(dim=1)

    def gathering_is_faster(self, features_BCHW: Tensor) -> bool:
        """Tell whether `gathered_sum` is faster than evaluating all components.

        For one position, gathering the weights takes longer than multiplying by all of them.
        Linear components always have one position, because they average first.
        """
        positions = 1 if self.is_linear else features_BCHW[0, 0].numel()
        return self.evaluated < self.components and positions > 1

    def gathered_sum(self, features_BCHW: Tensor, weights_BN: Tensor) -> Tensor:
        """Compute the (B, D) weighted sum of the `evaluated` components of largest weight of each image.

        The other weights must be 0. Not for linear components, which average first and have
        biases and no ReLU; see `gathering_is_faster`.
        """
        # The K components of each image; of equal weights, the lower index comes first.
        sorted_BN, order_BN = weights_BN.sort(dim=1, descending=True, stable=True)
        largest_BK = sorted_BN[:, : self.evaluated]
        # `chosen` (B K,) has the K components of each image, one image after the other.
        chosen = order_BN[:, : self.evaluated].flatten()

        # At first (B, 1, C, M), because all K components read the same map.
        x_BKcM = features_BCHW.flatten(start_dim=2).unsqueeze(1)

        # Run their filters, which differ from image to image.
        for weight_Noi in self.weights:
            filters_BKoi = weight_Noi.index_select(0, chosen).unflatten(0, (-1, self.evaluated))
            x_BKcM = self.activation(filters_BKoi @ x_BKcM)
        # Maps (B K, c, H, W) again, for the pooling.
        maps = torch.unflatten(x_BKcM.flatten(end_dim=1), 2, features_BCHW.shape[2:])

        # Sum whole covariance roots, and take the triangle of the sum: once per image instead of
        # K times.
        root_layer = self.after if isinstance(self.after, ISqrtCov) else None
        if root_layer is None:
            pooled = self.after(maps)
        else:
            # Whole roots, of c^2 numbers.
            pooled = covariance_root(maps, root_layer.config).flatten(start_dim=1)
        pooled_BKD = torch.unflatten(at_least_float32(pooled), 0, (-1, self.evaluated))
        sum_BD = (largest_BK.unsqueeze(1) @ pooled_BKD).squeeze(1)
        return (
            sum_BD
            if root_layer is None
            else sum_BD.index_select(1, root_layer.triangle_for(sum_BD))
        )

    def routed_sum(self, features_BCHW: Tensor, weights_BN: Tensor) -> Tensor:
        """Compute the (B, D) weighted sum; run each component only on images where its weight is not 0."""
        x_BCHW = self.before(features_BCHW)
        # The filters by step, then by component.
        filters = [weight_Noi.unbind() for weight_Noi in self.weights]
        # Only linear components have biases.
        biases = [bias.chunk(self.components) for bias in self.biases]

        # Each component runs once, on the images that chose it.
        weighted = []
        indices = []
        for component in range(self.components):
            images = weights_BN[:, component].nonzero().squeeze(1)
            if len(images) == 0:
                continue

            x = x_BCHW[images]
            for step in range(len(filters)):
                kernel = filters[step][component][:, :, None, None]
                if self.is_linear:
                    x = F.conv2d(x, kernel, biases[step][component])
                else:
                    x = self.activation(F.conv2d(x, kernel))
            weighted.append(self.after(x) * weights_BN[images, component].unsqueeze(1))
            indices.append(images)

        # Sum what an image's components gave.
        vectors = torch.cat(weighted)  # one for each pair of an image and one of its components
        total_BD = vectors.new_zeros(len(weights_BN), vectors.shape[1])
        return total_BD.index_add(0, torch.cat(indices), vectors)

    def macs(self, shape: torch.Size) -> int:
        """Count the multiply-adds per image of `evaluated` components, for a map of *shape* (B, C, H, W)."""
        positions = 1 if self.is_linear else shape[2] * shape[3]
        weights: int = sum(weight[0].numel() for weight in self.weights)
        return self.evaluated * positions * weights


def build_pooling(
    kind: ComponentKind, channels: int, root: NewtonSchulzConfig
) -> tuple[nn.Module, int]:
    """Build the pooling of a map of *channels*; return it and the length of its vector."""
    if kind == "sop":
        layer = ISqrtCov(channels, root)
        return layer, layer.out_features
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


class FusionHead(nn.Module):
    """Classify vectors (B, D): batch norm (with *norm*), dropout, linear layer; logits (B, classes)."""

    def __init__(self, length: int, num_classes: int, *, norm: bool, dropout: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(length) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(length, num_classes)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Compute the logits."""
        return self.fc(self.dropout(self.bn(pooled_BD)))


class GateNoise(nn.Module):
    """Noise gamma softplus(Wn f) (B, N) of the gate, computed from f (B, D); only for training.

    *length* is D, and *noise_per* says whether gamma is drawn once per image or for each of its
    N components.
    """

    def __init__(self, length: int, components: int, noise_per: NoisePer) -> None:
        super().__init__()
        self.noise_per = noise_per
        self.weight = nn.Parameter(torch.full((components, length), 1.0 / length))

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Draw the noise (B, N) that is added to the gate's logits."""
        with without_autocast(feature_BD):
            scale_BN = F.softplus(F.linear(at_least_float32(feature_BD), self.weight))
            drawn = scale_BN[:, :1] if self.noise_per == "image" else scale_BN
            gamma = torch.randn_like(drawn)
            return gamma * scale_BN


class SparseGate(nn.Module, ExportHints):
    """Map a feature map to weights (B, N): K of them positive with sum 1, the others 0.

    All elements of Wg and Wn start as 1 / D, as in the released code, so all logits are equal at
    first.

    Args:
        feature: Computes f (B, D) from the feature map with the prediction layers and a pooling.
        length: D.
        components: N.
        chosen: K.

    Examples:
        >>> gate = sopdeploy.layers.SparseGate(
        ...     sopdeploy.layers.ISqrtCov(64), length=2080, components=4, chosen=2
        ... )
        >>> gate(torch.rand(1, 64, 7, 7))
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]], grad_fn=<SoftmaxBackward0>)
    """

    keep_float32 = True
    is_gate = True

    def __init__(self, feature: nn.Module, length: int, components: int, chosen: int) -> None:
        super().__init__()
        self.feature = feature
        self.chosen = chosen
        self.weight = nn.Parameter(torch.full((components, length), 1.0 / length))

    def logits(self, feature_BD: Tensor) -> Tensor:
        """Compute Wg f as (B, N) in float32 or float64: half precision would select other components."""
        with without_autocast(feature_BD):
            return F.linear(at_least_float32(feature_BD), self.weight)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Compute the weights without noise."""
        return softmax_of_largest(self.logits(self.feature(features_BCHW)), self.chosen)


def rank(logits_BN: Tensor) -> Tensor:
    """Rank the logits of each gate as int32 (B, N): 0 is the largest, ties by lower index.

    All N^2 pairs are compared, so that ties do not depend on a runtime's sort and the exported
    graph has no data-dependent shape.
    """
    own_BN1 = logits_BN.unsqueeze(2)
    other_B1N = logits_BN.unsqueeze(1)
    index_N = torch.arange(logits_BN.shape[1], device=logits_BN.device)

    # At [own, other], true if the other one has the lower index.
    earlier_NN = index_N.unsqueeze(0) < index_N.unsqueeze(1)
    ahead_BNN = (other_B1N > own_BN1) | ((other_B1N == own_BN1) & earlier_NN)
    return ahead_BNN.sum(dim=2, dtype=torch.int32)


def softmax_of_largest(logits_BN: Tensor, chosen: int) -> Tensor:
    """Compute the softmax over the *chosen* largest logits of each row, 0 elsewhere: (B, N)."""
    return logits_BN.masked_fill(rank(logits_BN) >= chosen, float("-inf")).softmax(dim=1)


def balance_loss(weights_BN: Tensor, alpha: float | None, batches_per_step: int = 1) -> Tensor:
    """Compute alpha / S (std / mean)^2 of the load (N,), the sum of *weights_BN* over the images.

    S is the number of images of a step, which has *batches_per_step* batches like this one.

    Eq. (4) has no S, because the paper sums the cross entropy over the images of a step, as in
    the released trainer; here it is their mean. In the paper, alpha / S is 100 / 256 = 0.39.
    The step's loss is the mean of its batches, each weighted by its fraction of the images.

    Where `torch.distributed` is initialized, load and S are sums over all ranks. The gradient
    is then the gradient of the whole batch if the trainer averages the gradients of the ranks, each
    weighted by its fraction of the images.

    Args:
        weights_BN: The weights that `SparseGate` computes.
        alpha: The weight of the loss; None gives alpha / S the paper's value for any S.
        batches_per_step: Number of batches whose gradients make one update.

    Returns:
        A scalar, 0 if all components have the same load.

    Examples:
        >>> sopdeploy.layers.balance_loss(torch.full((8, 4), 0.25), alpha=100.0)
        tensor(0.)
    """
    count = weights_BN.new_full((1,), weights_BN.shape[0])

    # Loads and number of images are one tensor, so that one reduction sums both.
    summed = torch.cat([weights_BN.sum(dim=0), count])
    if dist.is_available() and dist.is_initialized():
        summed = all_reduce(summed)  # type: ignore[no-untyped-call]

    # The sums; `images` is S.
    load_N = summed[:-1]
    images = summed[-1].detach() * batches_per_step
    factor = PAPER_ALPHA / PAPER_BATCH if alpha is None else alpha / images
    return factor * (load_N.var(correction=1) / load_N.mean().square())
