"""What must hold of a second-order part whatever the picture: its root is symmetric, its steps are the steps.

Measured on the form that ships, as the network computes it in the types that ship. A noisy iteration would
raise the noise floor of the whole network with it and pass there; here it stands alone. Each part is given
the maps that it saw, and its root R is held against R*, N steps of the library in float64 on the same maps.

The bound. Let e = ||R - R*|| / ||R*|| in Frobenius norms. The library's own form in the same types is e0
away; as for any output, `FLOORS` times that is allowed, and at least as many roundings. But never more than
`ceiling`, what N steps can lose at all in a type of unit roundoff u, so that noise in both forms (products in
TF32, say) shows as well. All else follows from e: R* is symmetric, so ||R - R^T|| <= 2 e ||R*||, and with
S = R* R* <= covariance, ||R R - R* R*|| <= 2 e ||R*||_2 ||R*|| <= 2 e d^(1/4) ||covariance||, since
||R*||_2^2 <= ||S|| and ||R*||^2 <= trace(S) <= sqrt(d) ||S||.
"""

import math
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

PICTURES = 4
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
FLOORS = {"float32": FLOORS_BY_PRECISION["fp32"], "float16": FLOORS_BY_PRECISION["fp16"]}


def spectral_records(network: nn.Module, pixels: Tensor) -> tuple[SpectralRecord, ...]:
    """Return a record for every second-order part of *network*, measured on the first *pixels*."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str) -> Any:
        return lambda _part, inputs: seen.setdefault(name, inputs)

    parts = {name: part for name, part in network.named_modules() if rule_of(part) is not None}
    handles = [part.register_forward_pre_hook(keep(name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            network(pixels[:PICTURES])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(record(named(name, parts[name]), parts[name], seen[name]) for name in seen)


def named(name: str, part: nn.Module) -> str:
    """Return what the report calls the root that the part *name* takes."""
    inner = f"{name}.root" if isinstance(part, CompensatedAfter) else name
    return inner.removeprefix("network.")


def rule_of(part: nn.Module) -> NewtonSchulzConfig | None:
    """Return the rule of the root that *part* takes, if it takes one."""
    if isinstance(part, CompensatedAfter):
        return part.root.config
    if isinstance(part, Experts):
        return part.root
    return part.config if isinstance(part, ISqrtCov | LoweredRoot | ReferenceRoot) else None


def maps_and_roots(part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the maps (P, d, H, W) that *part* takes roots of, given *inputs*, and the roots (P, d, d)."""
    if isinstance(part, ISqrtCov):
        return inputs[0], covariance_root(inputs[0], part.config)
    taker: Any = part.root if isinstance(part, CompensatedAfter) else part
    found: tuple[Tensor, Tensor] = taker.roots(*inputs)
    return found


@torch.no_grad()
def record(name: str, part: nn.Module, inputs: tuple[Tensor, ...]) -> SpectralRecord:
    """Return what was measured on what *part* was given."""
    rule = rule_of(part)
    assert rule is not None  # noqa: S101 - for the type; only such parts are recorded
    maps, root = maps_and_roots(part, inputs)
    exact = covariance_root(maps.double(), rule)
    floor = relative(covariance_root(maps, rule) - exact, exact)
    squared = target(maps.double(), rule)
    return SpectralRecord(
        part=name,
        iterations=rule.iterations,
        stored=rule.stored,
        asymmetry=relative(root - root.transpose(1, 2), exact),
        residual=relative(root.double() @ root.double() - squared, squared),
        residual_exact=relative(exact @ exact - squared, squared),
        distance=relative(root - exact, exact),
        allowed=allowed(floor, ceiling(maps, rule), rule),
        width=maps.shape[1],
    )


def allowed(floor: float, most: float, rule: NewtonSchulzConfig) -> float:
    """Return how far a root may be from N exact steps, of its norm."""
    smallest = max(ROUNDOFF[rule.stored], 8 * ROUNDOFF["float32"])
    return min(FLOORS[rule.stored] * max(floor, smallest), most)


def ceiling(maps: Tensor, rule: NewtonSchulzConfig) -> float:
    """Return what the root of *maps* can lose at most, of its norm.

    Three products a step, each with one rounding of what is stored and sqrt(d) of its sums, which are of
    random sign (Higham and Mary, 2019); an error in a direction of no variance grows by 3/2 in each step.
    Centring loses a rounding for each time that the map is larger than its deviations.
    """
    products, sums = 3 * rule.iterations, math.sqrt(maps.shape[1])
    kept, wide = ROUNDOFF[rule.stored], ROUNDOFF["float32"]
    deviations = centered(maps.double())
    sizes = torch.linalg.vector_norm(deviations, dim=(1, 2)).clamp_min(SMALLEST_NORM)
    offset = float((torch.linalg.vector_norm(maps.double(), dim=(1, 2, 3)) / sizes).max())
    return 1.5**rule.iterations * (products * (kept + sums * wide) + 4 * offset * wide)


def target(maps: Tensor, rule: NewtonSchulzConfig) -> Tensor:
    """Return what the square of the root comes near to: the covariance, divided where it stays so."""
    whole = covariance(centered_and_scaled(maps))
    if rule.compensate:
        return whole
    norm = covariance_trace(whole) if rule.prenorm == "trace" else frobenius_norm(whole)
    return whole / norm.clamp_min(SMALLEST_NORM)


def violation(records: tuple[SpectralRecord, ...]) -> str | None:
    """Say which part of *records* is the first to break an invariant, and by how much; None if none does."""
    for found in records:
        moved = abs(found.residual - found.residual_exact)
        checks = (
            ("its root is not symmetric: asymmetry", found.asymmetry, 2 * found.allowed),
            (
                f"its {found.iterations} steps leave another residual: moved by",
                moved,
                2 * found.width**0.25 * found.allowed,
            ),
            (f"its root is not that of {found.iterations} steps: off by", found.distance, found.allowed),
        )
        for what, value, most in checks:
            if not value <= most:
                return f"{found.part}: {what} {value:.2g}, {most:.2g} is allowed"
    return None


def relative(difference: Tensor, whole: Tensor) -> float:
    """Return the largest ratio of two Frobenius norms over matrices that are not zero."""
    sizes = torch.linalg.matrix_norm(whole.double())
    ratios = torch.linalg.matrix_norm(difference.double()) / sizes.clamp_min(1e-12)
    return float(ratios[sizes > 1e-12].max()) if bool((sizes > 1e-12).any()) else 0.0
