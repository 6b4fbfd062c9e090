"""Compact bilinear pooling: the bilinear matrix, projected to D dimensions by two count sketches.

Paper: Gao et al., "Compact Bilinear Pooling" (CVPR 2016), algorithm 2 (tensor sketch): the circular
convolution of two sketches of each position, by FFT, summed over positions; signed root, unit length.

Summing first gives the same numbers without an FFT, which TensorRT does not have, and without a vector
of D per position: element k is the sum of s1_i s2_j (X X^T)_ij over all i, j with h1_i + h2_j = k mod D.
Letters: B images, C channels, M positions, D sketch dimensions, E entries of the fullest element, K = C^2.
"""

from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from sopdeploy.pooling.base import GlobalPooling, PoolingConfig, signed_root, unit_length
from sopdeploy.pooling.count_sketch import draw_sketches


class CompactBilinearConfig(PoolingConfig):
    """`dim` is D; the sketches are drawn from `seed`."""

    kind: Literal["cbp"] = "cbp"
    dim: Annotated[int, pydantic.Field(ge=1)] = 8192
    seed: Annotated[int, pydantic.Field(ge=0)] = 0

    def build(self, channels: int) -> GlobalPooling:
        """Return the layer; it has no weights."""
        return CompactBilinear(self, channels)


class CompactBilinear(GlobalPooling):
    """Feature map (B, C, H, W) in, tensor sketch of its bilinear matrix (B, D) out."""

    entries: Tensor
    signs: Tensor

    def __init__(self, config: CompactBilinearConfig, channels: int) -> None:
        super().__init__()
        self.out_features = config.dim
        entries, signs = sketch_table(config, channels)
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("signs", signs, persistent=False)

    def pool(self, features: Tensor) -> Tensor:
        """Return the vector."""
        x_BCM = features.flatten(start_dim=2)
        product_BK = (x_BCM @ x_BCM.transpose(1, 2)).flatten(start_dim=1)
        gathered_BDE = product_BK.index_select(1, self.entries.flatten()).view(-1, *self.signs.shape)
        return unit_length(signed_root((gathered_BDE * self.signs).sum(dim=2)))


def sketch_table(config: CompactBilinearConfig, channels: int) -> tuple[Tensor, Tensor]:
    """Return for each element the entries of the flattened matrix that it sums, and their signs.

    int64 and float32 of shape (D, E); elements of fewer entries are filled up with sign 0.
    """
    first, second = draw_sketches(2, channels, config.dim, config.seed)
    places_K = np.add.outer(first.places, second.places).ravel() % config.dim
    signs_K = np.multiply.outer(first.signs, second.signs).ravel()
    by_place_K = np.argsort(places_K, kind="stable")
    fill_D = np.bincount(places_K, minlength=config.dim)
    column_K = np.arange(len(places_K)) - np.repeat(fill_D.cumsum() - fill_D, fill_D)
    entries_DE = np.zeros((config.dim, fill_D.max()), dtype=np.int64)
    signs_DE = np.zeros(entries_DE.shape, dtype=np.float32)
    entries_DE[places_K[by_place_K], column_K] = by_place_K
    signs_DE[places_K[by_place_K], column_K] = signs_K[by_place_K]
    return torch.tensor(entries_DE), torch.tensor(signs_DE)
