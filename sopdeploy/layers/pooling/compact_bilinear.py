"""Compact bilinear pooling: the bilinear matrix, projected to D dimensions by two count sketches.

Paper: Gao et al., "Compact Bilinear Pooling" (CVPR 2016), algorithm 2 (tensor sketch): the circular
convolution of two sketches of each position, by FFT, summed over positions; signed root, unit length.

Summing first gives the same numbers without an FFT, which TensorRT does not have, and without a vector
of D per position: element k is the sum of s1_i s2_j (X X^T)_ij over all i, j with h1_i + h2_j = k mod D.
Letters: B images, C channels, M positions, D sketch dimensions, E entries of the fullest element, K = C^2.
"""

import math
import random
from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sopdeploy.config import Count
from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig, unit_length, unit_signed_root


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
