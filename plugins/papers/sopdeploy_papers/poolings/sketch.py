"""Poolings by count sketches: compact bilinear pooling and kernel pooling.

Papers: Gao et al., "Compact Bilinear Pooling" (CVPR 2016); Cui et al., "Kernel Pooling for
Convolutional Neural Networks" (CVPR 2017). A count sketch adds the C channels, with random
signs s, to D random elements h. The tensor sketch of order p is the circular convolution of p
sketches of each position, summed over positions; signed root, unit length.

No FFT is used, which TensorRT does not have. For order 2, element k is the sum of s1_i s2_j (X
X^T)_ij over all i, j with h1_i + h2_j = k mod D: one product and a gather. For higher orders,
the spectrum of a sketch is one product of x and the matrix s exp(-2 pi i f h / D), and the
inverse transform another one.

Letters: B images, C channels, M positions, D sketch dimensions, E entries of the fullest
element, P products C^2, F frequencies D / 2 + 1, S sketches.
"""

import math
import random
from typing import Annotated, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sopdeploy.base.config import Count
from sopdeploy.layers.pooling.base import (
    GlobalPooling,
    PoolingConfig,
    unit_length,
    unit_signed_root,
)

Seed = Annotated[int, pydantic.Field(ge=0)]


class Sketch(NamedTuple):
    """A count sketch: `elements` h (0 .. D - 1) and `signs` s of the C channels."""

    elements: list[int]
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
        entries, signs = tabulate_sketch(config, channels)
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("signs", signs, persistent=False)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the sketch (B, D): signed square root and unit length of the summed products."""
        x_BCM = features.flatten(start_dim=2)
        product_BP = (x_BCM @ x_BCM.transpose(1, 2)).flatten(start_dim=1)
        gathered_BDE = product_BP.index_select(1, self.entries.flatten()).view(
            -1, *self.signs.shape
        )
        return unit_signed_root((gathered_BDE * self.signs).sum(dim=2))


class CompactBilinearConfig(PoolingConfig):
    """`dim` is D, the length of the sketch; `seed` determines the random elements and signs."""

    layer = CompactBilinear
    kind: Literal["cbp"] = "cbp"
    dim: Count = 8192
    seed: Seed = 0


def tabulate_sketch(config: CompactBilinearConfig, channels: int) -> tuple[Tensor, Tensor]:
    """Tabulate which entries of the flattened matrix each element of the sketch sums, with which signs.

    Returns indices int64 and signs float32, both (D, E). Elements of fewer than E entries are
    padded with sign 0.
    """
    generator = random.Random(config.seed)  # noqa: S311 (a projection, not a secret)

    with torch.device("cpu"):  # `bincount` needs values, which `meta` does not have
        first, second = (draw_sketch(generator, channels, config.dim) for _ in range(2))
        sums_CC = torch.tensor(first.elements)[:, None] + torch.tensor(second.elements)
        element_P = sums_CC.flatten() % config.dim
        signs_P = torch.outer(torch.tensor(first.signs), torch.tensor(second.signs)).flatten()

        # The products sorted by the element that sums them, then those of each element as a row.
        entries_P = element_P.argsort(stable=True)
        counts = torch.bincount(element_P, minlength=config.dim).tolist()
        entries_DE = pad_sequence(list(torch.split(entries_P, counts)), batch_first=True)
        signs_DE = pad_sequence(list(torch.split(signs_P[entries_P], counts)), batch_first=True)

    device = torch.get_default_device()
    return entries_DE.to(device), signs_DE.to(device)


class KernelPooling(GlobalPooling):
    """Pool (B, C, H, W) maps to sketches of their powers 0 to `order`: (B, 1 + C + (order - 1) D).

    Attributes:
        real, imaginary: The spectra (S, C, F) of S sketches, by channel; each power p takes the next p of
            them.
        inverse_real, inverse_imaginary: The inverse transform of a real sequence, (F, D) each.
        order_weights: The learned weight of each power, at first those of the exponential function.
    """

    real: Tensor
    imaginary: Tensor
    inverse_real: Tensor
    inverse_imaginary: Tensor

    def __init__(self, config: "KernelPoolingConfig", channels: int) -> None:
        super().__init__()
        self.order = config.order
        dim = config.dim
        self.out_features = 1 + channels + (config.order - 1) * dim

        # Each power p from 2 on has p sketches.
        generator = random.Random(config.seed)  # noqa: S311 (a projection, not a secret)
        num_sketches = sum(range(2, config.order + 1))
        sketches = [draw_sketch(generator, channels, dim) for _ in range(num_sketches)]
        elements_SC = torch.tensor([sketch.elements for sketch in sketches])
        signs_SC1 = torch.tensor([sketch.signs for sketch in sketches]).unsqueeze(2)

        # Each frequency stands for itself and its mirror; the first and the last have none.
        cosine_DF, sine_DF = tabulate_waves(dim)
        count_F1 = torch.full((dim // 2 + 1, 1), 2.0 / dim)
        count_F1[[0, -1]] = 1.0 / dim

        # The Fourier transform as matrices, which every exporter can lower.
        for name, tensor in (
            ("real", cosine_DF[elements_SC] * signs_SC1),
            ("imaginary", -sine_DF[elements_SC] * signs_SC1),
            ("inverse_real", cosine_DF.T * count_F1),
            ("inverse_imaginary", -sine_DF.T * count_F1),
        ):
            self.register_buffer(name, tensor, persistent=False)

        taylor = [1.0 / math.sqrt(math.factorial(p)) for p in range(config.order + 1)]
        self.order_weights = nn.Parameter(torch.tensor(taylor))

    def pool(self, features: Tensor) -> Tensor:
        """Compute the vector (B, 1 + C + (order - 1) D): one part per power, each with a learned weight."""
        x_BMC = features.flatten(start_dim=2).transpose(1, 2)
        powers = [torch.ones_like(x_BMC[:, 0, :1]), x_BMC.mean(dim=1)]  # 0 and 1

        next_sketch = 0
        for p in range(2, self.order + 1):  # power p multiplies p sketches of its own
            powers.append(self.tensor_sketch(x_BMC, range(next_sketch, next_sketch + p)))
            next_sketch += p

        weights = self.order_weights.unbind()
        vector_BD = torch.cat(
            [weight * power for weight, power in zip(weights, powers, strict=True)], dim=1
        )
        # x / sqrt(|x| + 1e-8) is continuous; `unit_signed_root` jumps by 2e-4 at 0, which
        # amplifies rounding
        return unit_length(vector_BD * torch.rsqrt(vector_BD.abs() + 1e-8), dim=1)

    def tensor_sketch(self, x_BMC: Tensor, chosen: range) -> Tensor:
        """Compute the circular convolution (B, D) of each position's sketches, averaged over positions."""
        real_BMF = x_BMC @ self.real[chosen[0]]
        imaginary_BMF = x_BMC @ self.imaginary[chosen[0]]

        # Multiplication of complex numbers: a convolution of sketches, by frequency.
        for sketch in chosen[1:]:
            other_BMF = x_BMC @ self.real[sketch]
            other_imaginary_BMF = x_BMC @ self.imaginary[sketch]
            real_BMF, imaginary_BMF = (
                real_BMF * other_BMF - imaginary_BMF * other_imaginary_BMF,
                real_BMF * other_imaginary_BMF + imaginary_BMF * other_BMF,
            )

        return (
            real_BMF.mean(dim=1) @ self.inverse_real
            + imaginary_BMF.mean(dim=1) @ self.inverse_imaginary
        )


def tabulate_waves(dim: int) -> tuple[Tensor, Tensor]:
    """Tabulate cos and sin of 2 pi f k / D as float32, both (D, F); D must be even."""
    # the product is exact in int64, and the angle stays below 2 pi, where float64 is accurate
    turns_DF = torch.arange(dim).unsqueeze(1) * torch.arange(dim // 2 + 1) % dim
    angle_DF = turns_DF.double() * (2.0 * math.pi / dim)
    return angle_DF.cos().float(), angle_DF.sin().float()


class KernelPoolingConfig(PoolingConfig):
    """`dim` is the sketch dimension of each power from 2 to `order`; `seed` determines the sketches."""

    layer = KernelPooling
    kind: Literal["kernel"] = "kernel"
    order: Annotated[int, pydantic.Field(ge=2, le=4)] = 4
    dim: Annotated[int, pydantic.Field(ge=2, multiple_of=2)] = 4096
    seed: Seed = 0
