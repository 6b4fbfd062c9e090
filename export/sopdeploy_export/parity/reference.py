"""What the shipped file is measured against: the network in float64, and its own noise.

The noise floor is the distance of the network's own run from that, alone and in company, in the precision
that ships. For float32 that run is the network as it is; for float16 and bfloat16 the copy with the casts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.errors import ParityError
from sopdeploy.manifest import Precision
from sopdeploy_export.capture import Deployed
from sopdeploy_export.parity.report import FLOORS_BY_PRECISION
from sopdeploy_export.parity.routing import Routing, gate_logits, has_gate, routing

Arrays = dict[str, NDArray[Any]]


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


def reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    own: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    precision: Precision = "fp32",
    router: nn.Module | None = None,
) -> Reference:
    """Return the float64 outputs of *deployed* for *images* (P, H, W, 3), and the noise of *own*.

    *own* is its run in *precision*; None is *deployed* itself. *router* is a network whose gate has the same
    noise. Raises `ParityError` where numbers are not finite.
    """
    own = own or deployed
    pixels = torch.from_numpy(images)
    exact_network = copy.deepcopy(deployed).double()
    with torch.no_grad():
        exact = [value.numpy() for value in exact_network(pixels)]
        runs = [joined([own(pixels[i : i + 1]) for i in range(len(pixels))]), own(pixels)]
    routes = None
    if has_gate(deployed.network):
        allowed = FLOORS_BY_PRECISION[precision]
        routes = routing(
            gate_logits(exact_network, pixels), gate_logits(router or deployed, pixels), deployed, allowed
        )
    kept = slice(None) if routes is None else routes.steady
    floors = {}
    for position, name in enumerate(deployed.network.outputs):
        refuse_not_finite(exact[position], f"the network's own {name} are not finite; train it again")
        drawn = [run[position].numpy() for run in runs]
        for values in drawn:
            refuse_not_finite(values, f"in {precision} the network's own {name} are not finite; {ADVICE}")
        smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(exact[position]).max())
        floors[name] = max(
            smallest, *(float(np.abs(values - exact[position])[kept].max()) for values in drawn)
        )
    outputs = dict(zip(deployed.network.outputs, exact, strict=True))
    return Reference(outputs=outputs, noise_floor=floors, precision=precision, routing=routes)


ADVICE = "maps leave the range of the type: choose --precision bf16-backbone or fp32"


def refuse_not_finite(values: NDArray[Any], complaint: str) -> None:
    """Raise `ParityError` with *complaint* where *values* are not finite."""
    if not np.isfinite(values).all():
        raise ParityError(f"on the probe images {complaint}")


def joined(answers: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return every output of *answers*, one image each, as one tensor."""
    return [torch.cat(output) for output in zip(*answers, strict=True)]
