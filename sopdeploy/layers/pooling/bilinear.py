"""Bilinear poolings: B-CNN, improved B-CNN, the Gaussian embedding of G2DeNet, low-rank, compact and kernel.

Papers: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition" (ICCV 2015); Lin and Maji,
"Improved Bilinear Pooling with CNNs" (BMVC 2017).

Gao et al., "Compact Bilinear Pooling" (CVPR 2016), project the bilinear matrix to D dimensions by two count
sketches. Algorithm 2 (tensor sketch) is the circular convolution of two sketches of each position, by FFT,
summed over positions; signed root, unit length. Summing first gives the same numbers without an FFT, which
TensorRT does not have, and without a vector of D per position: element k is the sum of s1_i s2_j (X X^T)_ij
over all i, j with h1_i + h2_j = k mod D.

Letters: B images, C channels, M positions, D sketch dimensions, E entries of the fullest element, K = C^2.
"""

import math
import random
from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sopdeploy.config import Count
from sopdeploy.layers.covariance import covariance, covariance_factor
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_length, unit_signed_root
from sopdeploy.layers.pooling.covariance import NO_ROOT_FORM, MatrixRootConfig, square_root


class Bilinear(GlobalPooling):
    """Pool (B, C, H, W) maps to the signed square root of X X^T / M, a vector (B, C^2) of unit length."""

    def __init__(self, _config: PoolingConfig, channels: int) -> None:
        super().__init__()
        self.out_features = channels**2

    def matrix(self, features: Tensor) -> Tensor:
        """Compute X X^T / M (B, C, C) of *features* (B, C, H, W)."""
        return covariance(covariance_factor(features, centered=False))

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
        left_BDC = torch.cat([covariance(covariance_factor(features, centered=False)), mean_B1C], dim=1)
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


class Sketch(NamedTuple):
    """A count sketch: `indices` h (0 .. D - 1) and `signs` s of the C channels."""

    indices: list[int]
    signs: list[float]


def draw_sketch(generator: random.Random, channels: int, dim: int) -> Sketch:
    """Draw a sketch; Python's generator gives the same one for a seed on all versions and machines."""
    return Sketch(
        [int(generator.random() * dim) for _ in range(channels)],
        [1.0 if generator.random() < 0.5 else -1.0 for _ in range(channels)],
    )


class CompactBilinear(GlobalPooling):
    """Pool (B, C, H, W) maps to the tensor sketch (B, D) of their bilinear matrix."""

    entries: Tensor
    signs: Tensor

    def __init__(self, config: "CompactBilinearConfig", channels: int) -> None:
        super().__init__()
        self.out_features = config.dim
        entries, signs = sketch_table(config, channels)
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("signs", signs, persistent=False)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the sketch (B, D): signed square root and unit length of the summed products."""
        x_BCM = features.flatten(start_dim=2)
        product_BK = (x_BCM @ x_BCM.transpose(1, 2)).flatten(start_dim=1)
        gathered_BDE = product_BK.index_select(1, self.entries.flatten()).view(-1, *self.signs.shape)
        return unit_signed_root((gathered_BDE * self.signs).sum(dim=2))


class CompactBilinearConfig(PoolingConfig):
    """Options: `dim` is D, the length of the sketch; `seed` determines the random indices and signs."""

    layer = CompactBilinear
    kind: Literal["cbp"] = "cbp"
    dim: Count = 8192
    seed: Annotated[int, pydantic.Field(ge=0)] = 0


def sketch_table(config: CompactBilinearConfig, channels: int) -> tuple[Tensor, Tensor]:
    """Tabulate which entries of the flattened matrix each element of the sketch sums, with which signs.

    Returns indices int64 and signs float32, both (D, E). Elements of fewer than E entries are padded with
    sign 0.
    """
    generator = random.Random(config.seed)  # noqa: S311 (a projection, not a secret)
    with torch.device("cpu"):  # `bincount` needs values, which `meta` does not have
        first, second = (draw_sketch(generator, channels, config.dim) for _ in range(2))
        sums_CC = torch.tensor(first.indices)[:, None] + torch.tensor(second.indices)
        element_K = sums_CC.flatten() % config.dim
        signs_K = torch.outer(torch.tensor(first.signs), torch.tensor(second.signs)).flatten()
        entries_K = element_K.argsort(stable=True)
        counts = torch.bincount(element_K, minlength=config.dim).tolist()
        entries_DE = pad_sequence(list(torch.split(entries_K, counts)), batch_first=True)
        signs_DE = pad_sequence(list(torch.split(signs_K[entries_K], counts)), batch_first=True)
    device = torch.get_default_device()
    return entries_DE.to(device), signs_DE.to(device)


class KernelPooling(GlobalPooling):
    """Pool (B, C, H, W) maps to sketches of their powers 0 to `order`: (B, 1 + C + (order - 1) D)."""

    not_exportable = "its FFT has no TensorRT form; train with pooling cbp, its second order without an FFT"
    indices: Tensor
    signs: Tensor

    def __init__(self, config: "KernelPoolingConfig", channels: int) -> None:
        super().__init__()
        self.config = config
        self.out_features = 1 + channels + (config.order - 1) * config.dim
        generator = random.Random(config.seed)  # noqa: S311 (a projection, not a secret)
        count = sum(range(2, config.order + 1))  # p sketches for the power p
        sketches = [draw_sketch(generator, channels, config.dim) for _ in range(count)]
        self.register_buffer("indices", torch.tensor([s.indices for s in sketches]), persistent=False)
        self.register_buffer("signs", torch.tensor([s.signs for s in sketches]), persistent=False)
        taylor = [1.0 / math.sqrt(math.factorial(p)) for p in range(config.order + 1)]
        self.order_weights = nn.Parameter(torch.tensor(taylor))

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector (B, 1 + C + (order - 1) D): one part per power, each with a learned weight."""
        x_BMC = features.flatten(start_dim=2).transpose(1, 2)
        sketches = zip(self.indices, self.signs, strict=True)  # each power takes the next p of them
        high = [self.tensor_sketch(x_BMC, islice(sketches, p)) for p in range(2, self.config.order + 1)]
        powers = [x_BMC.new_ones(len(x_BMC), 1), x_BMC.mean(dim=1), *high]
        weighted = [weight * power for weight, power in zip(self.order_weights, powers, strict=True)]
        vector_BD = torch.cat(weighted, dim=1)
        # x / sqrt(|x| + 1e-8) is continuous; `unit_signed_root` jumps by 2e-4 at 0, which amplifies rounding
        return unit_length(vector_BD * torch.rsqrt(vector_BD.abs() + 1e-8), dim=1)

    def tensor_sketch(self, x_BMC: Tensor, sketches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the circular convolution (B, D) of each position's *sketches*, averaged over positions."""
        empty_BMD = x_BMC.new_zeros(*x_BMC.shape[:2], self.config.dim)
        spectrum_BMF = torch.ones((), dtype=torch.complex64, device=x_BMC.device)
        for indices_C, signs_C in sketches:
            sketch_BMD = torch.index_add(empty_BMD, 2, indices_C, x_BMC * signs_C)
            spectrum_BMF = spectrum_BMF * torch.fft.rfft(sketch_BMD)
        return torch.fft.irfft(spectrum_BMF.mean(dim=1), n=self.config.dim)


class KernelPoolingConfig(PoolingConfig):
    """`dim` is the sketch dimension of each power from 2 to `order`; `seed` determines the sketches."""

    layer = KernelPooling
    kind: Literal["kernel"] = "kernel"
    order: Annotated[int, pydantic.Field(ge=2, le=4)] = 4
    dim: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] = 4096
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
