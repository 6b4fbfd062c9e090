"""Check the matrix square roots of second-order modules: symmetry, residual and distance from N exact steps.

The exported modules are measured in the exported dtypes. An inaccurate iteration would raise the noise floor
of the whole network and pass there; here every root R is compared with R*, N Newton-Schulz steps in float64
on the same feature maps.

Bounds. Let e = ||R - R*|| / ||R*|| in Frobenius norms. The library's own implementation in the same dtypes
has the error e0, and `FLOORS` * e0 is allowed, at most `_error_limit`: what N steps can lose with unit
roundoff u. The limit exposes noise that affects both implementations, such as TF32 products. The other bounds
follow from e: R* is symmetric, so ||R - R^T|| <= 2 e ||R*||, and with S = R* R* <= covariance,
||R R - R* R*|| <= 2 e ||R*||_2 ||R*|| <= 2 e d^(1/4) ||covariance||, since ||R*||_2^2 <= ||S|| and
||R*||^2 <= trace(S) <= sqrt(d) ||S||.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.layers.covariance import (
    centered,
    centered_and_scaled,
    covariance,
    covariance_trace,
    frobenius_norm,
)
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, ISqrtCov, covariance_root
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.parity.report import FLOORS_BY_PRECISION, SpectralRecord
from sopdeploy_export.rewrites.linear import CompensatedAfter
from sopdeploy_export.rewrites.mixture import Experts
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot
from sopdeploy_export.rewrites.reference_formulas import ReferenceRoot

IMAGES = 4
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
FLOORS = {"float32": FLOORS_BY_PRECISION["fp32"], "float16": FLOORS_BY_PRECISION["fp16"]}


def spectral_records(network: nn.Module, pixels: Tensor) -> tuple[SpectralRecord, ...]:
    """Measure every second-order module of *network* on the first images of *pixels* (P, H, W, 3)."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str, _part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, inputs)

    parts = {name: part for name, part in network.named_modules() if _newton_schulz_config(part) is not None}
    handles = [part.register_forward_pre_hook(partial(keep, name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            network(pixels[:IMAGES])
    finally:
        for handle in handles:
            handle.remove()
    records = []
    for name, inputs in seen.items():
        label = f"{name}.root" if isinstance(parts[name], CompensatedAfter) else name
        records.append(measure_root(label.removeprefix("network."), parts[name], inputs))
    return tuple(records)


def _newton_schulz_config(part: nn.Module) -> NewtonSchulzConfig | None:
    if isinstance(part, CompensatedAfter):
        return part.root.config
    if isinstance(part, Experts):
        return part.config
    return part.config if isinstance(part, ISqrtCov | LoweredRoot | ReferenceRoot) else None


@torch.no_grad()
def measure_root(name: str, part: nn.Module, inputs: tuple[Tensor, ...]) -> SpectralRecord:
    """Measure the roots that *part* computes from *inputs*, against N steps in float64."""
    config = _newton_schulz_config(part)
    assert config is not None  # noqa: S101 - only modules with a root are measured
    if isinstance(part, ISqrtCov):
        maps, root = inputs[0], covariance_root(inputs[0], part.config)
    else:
        module: Any = part.root if isinstance(part, CompensatedAfter) else part
        maps, root = module.roots(*inputs)
    exact = covariance_root(maps.double(), config)
    squared = covariance(centered_and_scaled(maps.double()))
    if not config.compensate:
        norm = covariance_trace(squared) if config.prenorm == "trace" else frobenius_norm(squared)
        squared = squared / norm.clamp_min(SMALLEST_NORM)
    own_error = _relative_norm(covariance_root(maps, config) - exact, exact)
    smallest = max(ROUNDOFF[config.stored], 8 * ROUNDOFF["float32"])
    return SpectralRecord(
        part=name,
        iterations=config.iterations,
        stored=config.stored,
        asymmetry=_relative_norm(root - root.transpose(1, 2), exact),
        residual=_relative_norm(root.double() @ root.double() - squared, squared),
        residual_exact=_relative_norm(exact @ exact - squared, squared),
        distance=_relative_norm(root - exact, exact),
        allowed=min(FLOORS[config.stored] * max(own_error, smallest), _error_limit(maps, config)),
        width=maps.shape[1],
    )


def _error_limit(maps: Tensor, config: NewtonSchulzConfig) -> float:
    """Bound the relative error that rounding can cause in the root of *maps* (P, d, H, W).

    Each step has three products. Each product rounds its stored result once, and its sums of d terms lose
    sqrt(d) roundoffs, because rounding errors have random signs (Higham and Mary, 2019). An error in a
    direction without variance grows by 3/2 per step. Centering loses precision in proportion to the ratio
    between the maps and their deviations from the mean.
    """
    products, sums = 3 * config.iterations, math.sqrt(maps.shape[1])
    stored, float32 = ROUNDOFF[config.stored], ROUNDOFF["float32"]
    deviations = centered(maps.double())
    sizes = torch.linalg.vector_norm(deviations, dim=(1, 2)).clamp_min(SMALLEST_NORM)
    offset = float((torch.linalg.vector_norm(maps.double(), dim=(1, 2, 3)) / sizes).max())
    return 1.5**config.iterations * (products * (stored + sums * float32) + 4 * offset * float32)


def violation(records: tuple[SpectralRecord, ...]) -> str | None:
    """Describe the first violated invariant of *records*; None if all hold."""
    for found in records:
        moved = abs(found.residual - found.residual_exact)
        steps, allowed = found.iterations, found.allowed
        checks = (
            ("the root is not symmetric: asymmetry", found.asymmetry, 2 * allowed),
            (f"{steps} steps leave another residual: changed by", moved, 2 * found.width**0.25 * allowed),
            (f"the root differs from that of {steps} steps: by", found.distance, allowed),
        )
        for what, value, limit in checks:
            if not value <= limit:  # also true for NaN
                return f"{found.part}: {what} {value:.2g}, limit {limit:.2g}"
    return None


def _relative_norm(difference: Tensor, reference: Tensor) -> float:
    """Compute the maximum ratio of two Frobenius norms over matrices that are not zero."""
    sizes = torch.linalg.matrix_norm(reference.double())
    ratios = torch.linalg.matrix_norm(difference.double()) / sizes.clamp_min(1e-12)
    return float(ratios[sizes > 1e-12].max()) if bool((sizes > 1e-12).any()) else 0.0
