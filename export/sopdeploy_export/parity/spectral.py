"""Check the matrix square roots of second-order modules in the exported dtypes.

The distance from R*, the result of N Newton-Schulz steps in float64 on the same feature maps, is measured.
The comparison of outputs does not detect an inaccurate iteration, which raises the noise floor of the network
as well.

For a root R, let e = ||R - R*|| / ||R*|| in Frobenius norms, and e0 the same error of the library's own
implementation in the same dtypes. Two limits apply: e <= `ROOT_FLOORS` * e0, and e <= `_error_limit`, the
largest error that rounding can cause in N steps. The second one detects errors of both implementations, such
as TF32 products. A small e also bounds the asymmetry of R and its residual, because R* is symmetric and its
square is the covariance up to the error of N steps.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.layers.export_hints import export_hints
from sopdeploy.layers.isqrt_cov import SMALLEST_NORM, covariance_root, deviations
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.graph import PREFIX
from sopdeploy_export.parity.report import FLOORS_BY_PRECISION, SpectralRecord

ROOT_IMAGES = 4
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
ROOT_FLOORS = {"float32": FLOORS_BY_PRECISION["fp32"], "float16": FLOORS_BY_PRECISION["fp16"]}


def spectral_records(network: nn.Module, pixels: Tensor) -> tuple[SpectralRecord, ...]:
    """Measure the roots of every second-order module of *network* on four images of *pixels* (P, H, W, 3)."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str, _part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, inputs)

    parts: dict[str, Any] = {
        name: part for name, part in network.named_modules() if export_hints(part).computes_roots
    }
    handles = [part.register_forward_pre_hook(partial(keep, name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            network(pixels[:ROOT_IMAGES])
    finally:
        for handle in handles:
            handle.remove()
    records = []
    for name, inputs in seen.items():
        if parts[name].config is None:
            continue
        inner = [child for child, part in parts[name].named_children() if export_hints(part).computes_roots]
        records.append(measure_root(".".join([name.removeprefix(PREFIX), *inner]), parts[name], inputs))
    return tuple(records)


@torch.no_grad()
def measure_root(name: str, part: Any, inputs: tuple[Tensor, ...]) -> SpectralRecord:
    """Compare the roots that *part* computes from *inputs* with N Newton-Schulz steps in float64."""
    config: NewtonSchulzConfig = part.config
    maps, root = part.roots(*inputs)
    exact = covariance_root(maps.double(), config)
    own_error = _relative_norm(covariance_root(maps, config) - exact, exact)
    smallest = max(ROUNDOFF[config.stored], 8 * ROUNDOFF["float32"])
    return SpectralRecord(
        part=name,
        iterations=config.iterations,
        stored=config.stored,
        distance=_relative_norm(root - exact, exact),
        allowed=min(ROOT_FLOORS[config.stored] * max(own_error, smallest), _error_limit(maps, config)),
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
    sizes = torch.linalg.vector_norm(deviations(maps.double(), config), dim=(1, 2)).clamp_min(SMALLEST_NORM)
    offset = float((torch.linalg.vector_norm(maps.double(), dim=(1, 2, 3)) / sizes).max())
    return 1.5**config.iterations * (products * (stored + sums * float32) + 4 * offset * float32)


def violation(records: tuple[SpectralRecord, ...]) -> str | None:
    """Describe the first of *records* whose distance exceeds its limit; None if there is none."""
    for record in records:
        if not record.distance <= record.allowed:  # also true for NaN
            return (
                f"{record.part}: the root differs from that of {record.iterations} steps: by "
                f"{record.distance:.2g}, limit {record.allowed:.2g}"
            )
    return None


def _relative_norm(difference: Tensor, reference: Tensor) -> float:
    """Compute the maximum of ||difference|| / ||reference|| over all matrices with a reference above 0."""
    sizes = torch.linalg.matrix_norm(reference.double())
    ratios = torch.linalg.matrix_norm(difference.double()) / sizes.clamp_min(1e-12)
    return float(ratios[sizes > 1e-12].max()) if bool((sizes > 1e-12).any()) else 0.0
