"""Compare the routes of a mixture: which components the gate of the file chose for each image.

A gate that is nearly undecided may choose other components after rounding, and every later number then
changes although nothing is wrong. An image is undecided if the margin between its K-th and next gate logit is
within the measured noise of these logits. A route is the set of the K largest gate logits. The file exposes
only softmax weights, and the weight of a chosen component may underflow to 0 in float32. A component with
weight 0 in the file is therefore an error only if its weight must be positive within the tolerated drift.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.bundle.manifest import GATES
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.graph import Deployed
from sopdeploy_export.results import RoutingParity


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The float64 routes of P images through N components.

    `chosen` and `visible` are (P, N); `visible` marks the chosen components whose weight is positive in
    float32. `decided` (P,) marks the images whose margin is more than twice the tolerance, `unchanged` (P,)
    those whose route is the same in the network's own run in the exported precision.
    """

    chosen: NDArray[np.bool_]
    visible: NDArray[np.bool_]
    noise_floor: float
    tolerance: float
    decided: NDArray[np.bool_]
    unchanged: NDArray[np.bool_]


def find_gate(network: nn.Module) -> Any:
    """Find the gate of *network*, a layer that declares `is_gate`.

    Returns None unless there is exactly one and its weights are an output of *network*.
    """
    gates = [part for part in network.modules() if export_hints(part).is_gate]
    return gates[0] if len(gates) == 1 and GATES in getattr(network, "outputs", ()) else None


def gate_logits(deployed: Deployed, pixels: Tensor) -> NDArray[Any]:
    """Compute the gate logits (P, N) for *pixels*, in the dtype that *deployed* uses for them."""
    gate = find_gate(deployed.network)
    computed: list[Tensor] = []
    hook = gate.feature.register_forward_hook(
        lambda _part, _inputs, feature: computed.append(gate.logits(feature))
    )
    try:
        with torch.no_grad():
            deployed(pixels)
    finally:
        hook.remove()
    return computed[0].numpy()


def find_routes(exact: NDArray[Any], rounded: NDArray[Any], k: int, floors: float) -> Routing:
    """Compute the routes to *k* components from the float64 gate logits *exact* (P, N).

    *rounded* are the logits in the exported precision; the tolerance is *floors* times their error.
    """
    chosen = _largest(exact, k)
    ranked = -np.sort(-exact, axis=1)
    margin = ranked[:, k - 1] - ranked[:, k] if k < exact.shape[1] else np.full(len(exact), np.inf)
    rounding = 4 * float(np.finfo(np.float32).eps) * float(np.abs(exact).max())
    noise = max(rounding, float(np.abs(rounded - exact).max()))
    tolerance = floors * noise
    chosen_logits = np.where(chosen, exact, -np.inf)
    chosen_logits = chosen_logits - chosen_logits.max(axis=1, keepdims=True)
    log_weights = chosen_logits - np.log(np.exp(chosen_logits).sum(axis=1, keepdims=True))
    return Routing(
        chosen=chosen,
        visible=log_weights - 2 * tolerance > np.log(np.finfo(np.float32).tiny),
        noise_floor=noise,
        tolerance=tolerance,
        decided=margin > 2 * tolerance,
        unchanged=(_largest(rounded, k) == chosen).all(axis=1),
    )


def is_decided(logits: NDArray[Any], chosen: int, routing: RoutingParity) -> bool:
    """Return whether rounding cannot change the *chosen* largest of the gate logits (N,) of one image."""
    ranked = -np.sort(-logits)
    return bool((ranked[chosen - 1] - ranked[chosen:] > 2 * routing.tolerance).all())


def _largest(logits: NDArray[Any], k: int) -> NDArray[np.bool_]:
    # A stable sort resolves ties in favor of the lower index, as the gate does.
    by_size = np.argsort(-logits, axis=1, kind="stable")
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, by_size[:, :k], True, axis=1)
    return chosen


def rerouted(gates: NDArray[Any], routes: Routing) -> NDArray[np.bool_]:
    """Mark the images (P,) that the file routes to other components; *gates* (P, N) are its weights."""
    positive = gates > 0
    different: NDArray[np.bool_] = (positive & ~routes.chosen) | (~positive & routes.visible)
    return np.asarray(different.any(axis=1), dtype=np.bool_)


def comparable(rerouted_images: NDArray[np.bool_], routes: Routing) -> NDArray[np.bool_]:
    """Mark the images (P,) whose outputs can be compared: the decided ones.

    If none is decided, these are the images that neither rounding nor the file routes to other components;
    *rerouted_images* (P,) marks the latter.
    """
    return routes.decided if routes.decided.any() else routes.unchanged & ~rerouted_images


def routing_parity(rerouted_images: NDArray[np.bool_], routes: Routing) -> RoutingParity:
    """Summarize the routing; *rerouted_images* (P,) marks those rerouted at any batch size."""
    return RoutingParity(
        noise_floor=routes.noise_floor,
        tolerance=routes.tolerance,
        num_undecided=int((~routes.decided).sum()),
        num_flips=int((rerouted_images & ~routes.decided).sum()),
        num_wrong=int((rerouted_images & routes.decided).sum()),
        left_out=tuple(int(image) for image in np.flatnonzero(~comparable(rerouted_images, routes))),
    )
