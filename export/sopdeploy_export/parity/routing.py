"""Routing of mixtures: compare the K components that a gate chooses in the file and in the network.

A gate that is nearly undecided may choose other components after rounding, and every later number then
changes although nothing is wrong. An image is undecided if the margin between its K-th and next gate logit is
within the measured noise of these logits.

A route is the set of the K largest gate logits. The file exposes only softmax weights, and a chosen weight
may underflow to 0 in float32. Such a component does not contribute, so only components whose weight stays
positive under the tolerated drift count as missing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.layers.mixture.gate import SparseGate
from sopdeploy_export.parity.report import RoutingParity


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The float64 routes of P images through N components.

    `chosen` and `visible` are (P, N); `visible` are the chosen components whose weight is positive in
    float32. `steady` (P,) are the images to compare numbers on: the images with a clear margin or, where the
    gate is not `decided` on any image, the images whose route the network's own rounding does not change.
    """

    chosen: NDArray[np.bool_]
    visible: NDArray[np.bool_]
    margin: NDArray[np.float64]
    noise_floor: float
    tolerance: float
    steady: NDArray[np.bool_]
    decided: bool


def has_gate(network: nn.Module) -> bool:
    """Whether *network* has exactly one gate and its weights are an output."""
    gates = [part for part in network.modules() if isinstance(part, SparseGate)]
    return len(gates) == 1 and "gates" in getattr(network, "outputs", ())


def gate_of(network: nn.Module) -> SparseGate:
    """Find the first gate of *network*."""
    return next(part for part in network.modules() if isinstance(part, SparseGate))


def gate_logits(network: nn.Module, pixels: Tensor) -> NDArray[Any]:
    """Compute the gate logits (P, N) for *pixels*, in the dtype that *network* uses for them."""
    gate = gate_of(network)
    kept: list[Tensor] = []
    feature: nn.Module = gate.feature
    handle = feature.register_forward_hook(lambda _part, _inputs, output: kept.append(gate.logits(output)))
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        handle.remove()
    return kept[0].numpy()


def routing(exact: NDArray[Any], own: NDArray[Any], network: nn.Module, floors: float) -> Routing:
    """Compute the routes of the float64 gate logits *exact* (P, N) and their stability.

    *own* are the logits in the exported precision; the tolerance is *floors* times their error.
    """
    k = gate_of(network).chosen
    chosen = _largest(exact, k)
    ranked = -np.sort(-exact, axis=1)
    margin = ranked[:, k - 1] - ranked[:, k] if k < exact.shape[1] else np.full(len(exact), np.inf)
    smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(exact).max())
    noise = max(smallest, float(np.abs(own - exact).max()))
    tolerance = floors * noise
    steady = margin > 2 * tolerance
    decided = bool(steady.any())
    kept = np.where(chosen, exact, -np.inf)
    kept = kept - kept.max(axis=1, keepdims=True)
    log_weight = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    return Routing(
        chosen=chosen,
        visible=log_weight - 2 * tolerance > np.log(np.finfo(np.float32).tiny),
        margin=margin,
        noise_floor=noise,
        tolerance=tolerance,
        steady=steady if decided else (_largest(own, k) == chosen).all(axis=1),
        decided=decided,
    )


def _largest(logits: NDArray[Any], k: int) -> NDArray[np.bool_]:
    # A stable sort resolves ties in favor of the lower index, as the gate does.
    order = np.argsort(-logits, axis=1, kind="stable")
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    return chosen


def rerouted(gates: NDArray[Any], routes: Routing) -> NDArray[np.bool_]:
    """Find the images (P,) whose weights *gates* (P, N) in the file belong to other components."""
    given = gates > 0
    different: NDArray[np.bool_] = (given & ~routes.chosen) | (~given & routes.visible)
    return np.asarray(different.any(axis=1), dtype=np.bool_)


def compared(other: NDArray[np.bool_], routes: Routing) -> NDArray[np.bool_]:
    """Select the images (P,) to compare numbers on; *other* (P,) marks rerouted images."""
    kept: NDArray[np.bool_] = routes.steady & (routes.decided | ~other)
    return kept


def routing_parity(other: NDArray[np.bool_], routes: Routing) -> RoutingParity:
    """Summarize the routing; *other* (P,) marks the images rerouted at any batch size."""
    uncertain = ~routes.steady if routes.decided else np.ones_like(routes.steady)
    finite = routes.margin[np.isfinite(routes.margin)]
    return RoutingParity(
        noise_floor=routes.noise_floor,
        tolerance=routes.tolerance,
        smallest_margin=float(finite.min()) if len(finite) else 0.0,
        unsteady=int(uncertain.sum()),
        flips=int((other & uncertain).sum()),
        wrong=int((other & ~uncertain).sum()),
        left_out=tuple(int(image) for image in np.flatnonzero(~compared(other, routes))),
        usage=tuple(int(count) for count in routes.chosen.sum(axis=0)),
    )
