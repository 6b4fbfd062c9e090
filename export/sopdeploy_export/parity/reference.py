"""What the shipped file is measured against: the network in float64, and its own noise.

The noise floor is the distance of the network's own run from that, alone and in company, in the precision
that ships. For float32 that run is the network as it is; for float16 and bfloat16 the copy with the casts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.bundle.manifest import Precision
from sopdeploy.errors import ParityError
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity.report import FLOORS_BY_PRECISION
from sopdeploy_export.parity.routing import Routing, gate_logits, has_gate, routing

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Tensor], tuple[Tensor, ...]]
Gate = Callable[[Tensor], NDArray[Any]]
ALONE, TOGETHER = 4, 16  # probes the network computes one by one, and the largest batch it computes


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The network's outputs in float64, how far its own run in *precision* is from each, and its routes."""

    outputs: Arrays
    noise_floor: dict[str, float]
    precision: Precision = "fp32"
    routing: Routing | None = None

    @property
    def floors(self) -> float:
        """Return how many noise floors the file may drift."""
        return FLOORS_BY_PRECISION[self.precision]


def compute_reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    own: Run | None = None,
    precision: Precision = "fp32",
    own_gate: Gate | None = None,
) -> Reference:
    """Return the float64 outputs of *deployed* for *images* (P, H, W, 3), and the noise of *own*.

    *own* is its run in *precision*; None is *deployed* itself. *own_gate* gives its gate's
    logits. Raises `ParityError` where numbers are not finite.
    """
    own = own or deployed
    names, exact_network = deployed.network.outputs, copy.deepcopy(deployed).double()
    exact = network_outputs(exact_network, names, images, TOGETHER)
    together = network_outputs(own, names, images, TOGETHER)
    alone = network_outputs(own, names, images[:ALONE], 1)
    routes = None
    if has_gate(deployed.network):
        allowed = FLOORS_BY_PRECISION[precision]
        pixels = torch.from_numpy(images)
        own_logits = gate_logits(deployed, pixels) if own_gate is None else own_gate(pixels)
        routes = routing(gate_logits(exact_network, pixels), own_logits, deployed, allowed)
    kept = np.ones(len(images), dtype=bool) if routes is None else routes.steady
    if not kept.any():
        raise ParityError(
            f"the gate is undecided on every probe image, and rounding to {precision} sends each to other "
            f"components, so that no number can be compared; {UNDECIDED}"
        )
    floors = {}
    for name, values in exact.items():
        refuse_not_finite(values, f"the network's own {name} are not finite; train it again")
        for run in (together[name], alone[name]):
            refuse_not_finite(run, f"in {precision} the network's own {name} are not finite; {ADVICE}")
        smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(values).max())
        floors[name] = max(
            smallest,
            float(np.abs(together[name] - values)[kept].max(initial=0.0)),
            float(np.abs(alone[name] - values[:ALONE])[kept[:ALONE]].max(initial=0.0)),
        )
    return Reference(outputs=exact, noise_floor=floors, precision=precision, routing=routes)


UNDECIDED = "add --probes DIR with pictures like those it will see, or train it longer"
ADVICE = "maps leave the range of the type: choose --precision bf16-backbone or fp32"


def network_outputs(run: Run, names: Sequence[str], images: NDArray[np.uint8], batch: int) -> Arrays:
    """Return the outputs of *run* by name, computed in batches of at most *batch* images."""
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        chunks = [run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    joined = (torch.cat(values).numpy() for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))


def refuse_not_finite(values: NDArray[Any], complaint: str) -> None:
    """Raise `ParityError` with *complaint* where *values* are not finite."""
    if not np.isfinite(values).all():
        raise ParityError(f"on the probe images {complaint}")
