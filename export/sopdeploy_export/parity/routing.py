"""Routing flips: a gate that must choose K of N may choose others where it is nearly undecided.

The numbers after such a choice differ by much, though nothing is wrong. Whether a gate was undecided is
measured: its margin between the K-th and the next logit, against what those logits drift by themselves.

A route is the order of the gate's logits: the K largest. A file shows it by the weights it gives, which are a
softmax over the K: a weight may be chosen and yet be 0 in float32. Such a component adds nothing to the
answer, so only those count as missing whose weight would be seen, however its logit drifts.
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
    """The gate in float64 on P images: components chosen (P, N), margins (P,), noise, who is steady.

    `visible` (P, N) are those of the chosen whose weight is not 0 in float32. `steady` (P,) are the images to
    compare numbers on: where the gate is decided on some, those; where on none, those whose route the
    network's own rounding does not change.
    """

    chosen: NDArray[np.bool_]
    visible: NDArray[np.bool_]
    margin: NDArray[np.float64]
    noise_floor: float
    tolerance: float
    steady: NDArray[np.bool_]
    decided: bool


def has_gate(network: nn.Module) -> bool:
    """Say whether *network* routes each image by one gate, whose weights it gives away."""
    gates = [part for part in network.modules() if isinstance(part, SparseGate)]
    return len(gates) == 1 and "gates" in getattr(network, "outputs", ())


def gate_of(network: nn.Module) -> SparseGate:
    """Return the gate of *network*."""
    return next(part for part in network.modules() if isinstance(part, SparseGate))


def gate_logits(network: nn.Module, pixels: Tensor) -> NDArray[Any]:
    """Return the gate's logits (P, N) for *pixels*, in the type that *network* computes them in."""
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
    """Return the routes of *exact* (P, N) and which of them *floors* times the noise of *own* cannot change.

    Where the gate is undecided on every image, as before any training, no route is wrong.
    """
    chosen_count = gate_of(network).chosen
    chosen = largest(exact, chosen_count)
    ranked = -np.sort(-exact, axis=1)
    if chosen_count < exact.shape[1]:
        margin = ranked[:, chosen_count - 1] - ranked[:, chosen_count]
    else:
        margin = np.full(len(exact), np.inf)
    smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(exact).max())
    noise = max(smallest, float(np.abs(own - exact).max()))
    steady = margin > 2 * floors * noise
    decided = bool(steady.any())
    same = (largest(own, chosen_count) == chosen).all(axis=1)
    return Routing(
        chosen=chosen,
        visible=visible(exact, chosen, floors * noise),
        margin=margin,
        noise_floor=noise,
        tolerance=floors * noise,
        steady=steady if decided else same,
        decided=decided,
    )


def largest(logits: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Return (P, N): the *count* largest of each row; ties go to the lower index, as in the gate."""
    order = np.argsort(-logits, axis=1, kind="stable")
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :count], True, axis=1)
    return chosen


def visible(logits: NDArray[Any], chosen: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    """Return the *chosen* whose weight stays a normal float32 if every logit drifts by *tolerance*."""
    kept = np.where(chosen, logits, -np.inf)
    kept = kept - kept.max(axis=1, keepdims=True)
    share = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    seen: NDArray[np.bool_] = share - 2 * tolerance > np.log(np.finfo(np.float32).tiny)
    return seen


def rerouted(gates: NDArray[Any], routes: Routing) -> NDArray[np.bool_]:
    """Say of each image whether *gates* (P, N), weights of the file, are of other components."""
    given = gates > 0
    different: NDArray[np.bool_] = (given & ~routes.chosen) | (~given & routes.visible)
    return np.asarray(different.any(axis=1), dtype=np.bool_)


def counted(other: NDArray[np.bool_], routes: Routing) -> NDArray[np.bool_]:
    """Say on which images to compare numbers, given which took an *other* route at any batch size."""
    kept: NDArray[np.bool_] = routes.steady & (routes.decided | ~other)
    return kept


def routing_parity(other: NDArray[np.bool_], routes: Routing) -> RoutingParity:
    """Return the report, given which images took an *other* route at any batch size."""
    uncertain = ~routes.steady if routes.decided else np.ones_like(routes.steady)
    finite = routes.margin[np.isfinite(routes.margin)]
    return RoutingParity(
        noise_floor=routes.noise_floor,
        tolerance=routes.tolerance,
        smallest_margin=float(finite.min()) if len(finite) else 0.0,
        unsteady=int(uncertain.sum()),
        flips=int((other & uncertain).sum()),
        wrong=int((other & ~uncertain).sum()),
        left_out=tuple(int(image) for image in np.flatnonzero(~counted(other, routes))),
        usage=tuple(int(count) for count in routes.chosen.sum(axis=0)),
    )
