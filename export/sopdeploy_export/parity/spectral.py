"""What must hold of a second-order part whatever the picture: its root is symmetric, its steps are the steps.

Y of the truncated iteration is not the square root of A, and how far Y Y is from A is a property of N and
of the picture. In float64 and in the precision that ships it must be the same; where the two differ, the
iteration loses what its products round.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.pooling.isqrt_cov import ISqrtCov
from sopdeploy.pooling.isqrt_root import covariance_root, normalise
from sopdeploy.pooling.newton_schulz import newton_schulz
from sopdeploy.pooling.precision import at_least_float32
from sopdeploy_export.parity.report import SpectralRecord

PICTURES = 4


@torch.no_grad()
def spectral_records(network: nn.Module, pixels: Tensor) -> tuple[SpectralRecord, ...]:
    """Return a record for every second-order part of *network*, measured on the first *pixels*."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _part, inputs: seen.setdefault(name, inputs[0])

    parts = {name: part for name, part in network.named_modules() if isinstance(part, ISqrtCov)}
    handles = [part.register_forward_pre_hook(keep(name)) for name, part in parts.items()]
    try:
        network(pixels[:PICTURES])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(record(name.removeprefix("network."), parts[name], seen[name]) for name in seen)


def record(name: str, part: ISqrtCov, features: Tensor) -> SpectralRecord:
    """Return what was measured on the maps *features* (B, d, H, W) that *part* took."""
    root = covariance_root(features, part.rule)
    return SpectralRecord(
        part=name,
        iterations=part.rule.iterations,
        asymmetry=relative(root - root.transpose(1, 2), root),
        residual=residual(features, part, at_least_float32(features).dtype),
        residual_exact=residual(features.double(), part, torch.float64),
    )


def residual(features: Tensor, part: ISqrtCov, dtype: torch.dtype) -> float:
    """Return the largest ||Y Y - A|| / ||A||, the iteration run as *part* stores its matrices."""
    matrix = normalise(features, part.rule).matrix
    halved = part.rule.stored == "float16" and dtype != torch.float64
    stepped = newton_schulz(matrix.half() if halved else matrix, part.rule.iterations).to(dtype)
    return relative(stepped @ stepped - matrix, matrix)


def relative(difference: Tensor, whole: Tensor) -> float:
    """Return the largest ratio of two Frobenius norms over matrices that are not zero."""
    sizes = torch.linalg.matrix_norm(whole.double())
    ratios = torch.linalg.matrix_norm(difference.double()) / sizes.clamp_min(1e-12)
    return float(ratios[sizes > 1e-12].max()) if bool((sizes > 1e-12).any()) else 0.0
