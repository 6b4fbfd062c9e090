"""The reference of the comparison: the network in float64, and its own noise in the exported precision."""

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
SINGLE_IMAGES, BATCH = 4, 16
UNDECIDED = "add --probes DIR with images from the target domain, or train longer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The float64 outputs of the network, its noise floor per output in *precision*, and its routes."""

    outputs: Arrays
    noise_floor: dict[str, float]
    precision: Precision = "fp32"
    routing: Routing | None = None

    @property
    def floors(self) -> float:
        """The allowed drift in noise floors."""
        return FLOORS_BY_PRECISION[self.precision]


def compute_reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    own: Run | None = None,
    precision: Precision = "fp32",
    own_gate: Gate | None = None,
) -> Reference:
    """Compute the float64 outputs of *deployed* for *images* (P, H, W, 3) and the noise floor of *own*.

    *own* runs the network in *precision*, by default *deployed* itself; *own_gate* gives the gate logits of
    that run. The noise floor is the larger error of *own* in batches of 16 and image by image. Raises
    `ParityError` if outputs are not finite or the gate is undecided on every image.
    """
    own = own or deployed
    names, network64 = deployed.network.outputs, copy.deepcopy(deployed).double()
    exact = network_outputs(network64, names, images, BATCH)
    batched = network_outputs(own, names, images, BATCH)
    single = network_outputs(own, names, images[:SINGLE_IMAGES], 1)
    routes, kept = None, np.ones(len(images), dtype=bool)
    if has_gate(deployed.network):
        pixels = torch.from_numpy(images)
        own_logits = gate_logits(deployed, pixels) if own_gate is None else own_gate(pixels)
        routes = routing(gate_logits(network64, pixels), own_logits, deployed, FLOORS_BY_PRECISION[precision])
        kept = routes.steady
    if not kept.any():
        raise ParityError(
            f"the gate is undecided on every probe image and rounding to {precision} changes every route, "
            f"so no output can be compared; {UNDECIDED}"
        )
    floors = {}
    for name, values in exact.items():
        if not np.isfinite(values).all():
            raise ParityError(f"the network's own {name} are not finite on the probe images; train it again")
        if not (np.isfinite(batched[name]).all() and np.isfinite(single[name]).all()):
            raise ParityError(
                f"the network's own {name} are not finite in {precision} on the probe images: activations "
                "overflow; choose --precision bf16-backbone or fp32"
            )
        floors[name] = max(
            4 * float(np.finfo(np.float32).eps) * float(np.abs(values).max()),
            float(np.abs(batched[name] - values)[kept].max(initial=0.0)),
            float(np.abs(single[name] - values[:SINGLE_IMAGES])[kept[:SINGLE_IMAGES]].max(initial=0.0)),
        )
    return Reference(outputs=exact, noise_floor=floors, precision=precision, routing=routes)


def network_outputs(run: Run, names: Sequence[str], images: NDArray[np.uint8], batch: int) -> Arrays:
    """Run *images* in batches of at most *batch* and concatenate the outputs by name."""
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        chunks = [run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    joined = (torch.cat(values).numpy() for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))
