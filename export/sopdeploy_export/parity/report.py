"""The measurements of `parity.json`: drift, noise floors, top-1 agreement, routing and spectral errors.

Tolerances are multiples of a measured noise floor. The reference is the network in float64. The noise floor
of an output is the distance between that reference and the network's own run in the exported precision. The
file may drift by `FLOORS_BY_PRECISION` noise floors: 16 in float32, where reordered sums and folded batch
norms cause 1 to 4; 4 in a reduced precision, where the floor already contains the rounding to that precision.

Routing of mixtures: a gate that is nearly undecided may choose other components after rounding, and every
later number then changes although nothing is wrong. An image is undecided if the margin between its K-th and
next gate logit is within the measured noise of these logits. A route is the set of the K largest gate logits.
The file exposes only softmax weights, and the weight of a chosen component may underflow to 0 in float32. A
component with weight 0 in the file is therefore an error only if its weight must be positive within the
tolerated drift.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.bundle.manifest import Precision
from sopdeploy.config import StrictModel
from sopdeploy.evaluation.statistics import wilson
from sopdeploy.layers.export_hints import export_hints
from sopdeploy_export.graph import Deployed

PROVIDER = "CPUExecutionProvider"
LOGITS = "logits"
GATES = "gates"
FLOORS = 16.0
FLOORS_BY_PRECISION: Mapping[Precision, float] = {
    "fp32": FLOORS,
    "fp16": 4.0,
    "bf16-backbone": 4.0,
    "int8": 4.0,
}


def in_floors(drift: float, noise_floor: float) -> float:
    """Express *drift* in units of *noise_floor*, which is 0 if the outputs do not depend on the image."""
    if noise_floor == 0:
        return math.inf if drift else 0.0
    return drift / noise_floor


class Flip(StrictModel):
    """A probe image whose top class changed, and the network's margin between the two classes."""

    image: int
    network: int
    file: int
    margin: float
    cause: Literal["noise", "routing", "error"]


class Agreement(StrictModel):
    """Top-1 agreement between the file and the network.

    `flips_within_noise` counts changed top classes where the network's margin is at most twice the tolerance,
    `flips_by_routing` those of images excluded for their route, `flips` all other ones, which are errors.
    `low` and `high` are the 95 % Wilson interval of the agreement rate.
    """

    images: int
    agree: int
    flips_within_noise: int
    flips_by_routing: int = 0
    flips: int
    flipped: tuple[Flip, ...] = ()
    low: float
    high: float


class OutputParity(StrictModel):
    """The drift of one output, in the units of that output.

    `drift` maps each batch size to the maximum absolute difference from the float64 network;
    `batch_difference` is the maximum change caused by batching.
    """

    noise_floor: float
    tolerance: float
    drift: dict[str, float]
    batch_difference: float

    @property
    def largest_drift(self) -> float:
        """The maximum drift over all batch sizes."""
        return max(self.drift.values())

    @property
    def drift_in_floors(self) -> float:
        """The maximum drift in multiples of the noise floor."""
        return in_floors(self.largest_drift, self.noise_floor)


class RoutingParity(StrictModel):
    """Comparison of the routes that the gate of the file chose with those of the float64 network.

    The gate is undecided on an image if the margin between its K-th and the next logit is at most twice
    `tolerance`, the allowed drift of these logits; `undecided` is the number of these images. The images that
    the file routes to other components are counted as `flips` if the gate is undecided on them, and as
    `wrong` if not. `left_out` lists the images excluded from the drift and from the probes. `usage` is the
    number of images per component in float64.
    """

    noise_floor: float
    tolerance: float
    smallest_margin: float
    undecided: int
    flips: int
    wrong: int
    left_out: tuple[int, ...] = ()
    usage: tuple[int, ...] = ()


class PartDrift(StrictModel):
    """Drift and noise floor of the output of one module, in the units of that output.

    `share` is the root mean square error divided by the standard deviation of the output.
    """

    part: str
    drift: float
    noise_floor: float
    share: float

    @property
    def in_floors(self) -> float:
        """The drift in multiples of the noise floor."""
        return in_floors(self.drift, self.noise_floor)


class SpectralRecord(StrictModel):
    """Errors of the matrix square root R of one second-order module, measured in torch.

    `asymmetry` is max ||R - R^T|| / ||R||. `residual` is max ||R R - S|| / ||S|| for the covariance S of
    `width` channels; `residual_exact` is the residual of N iterations in float64.
    `distance` is max ||R - R*|| / ||R*|| for N iterations R* in float64, and `allowed` is its limit, from
    which the other limits follow. `stored` is the dtype of matrices between products.
    """

    part: str
    width: int
    iterations: int
    stored: Literal["float32", "float16"]
    asymmetry: float
    residual: float
    residual_exact: float
    distance: float
    allowed: float


class ClassMapParity(StrictModel):
    """The maximum difference between logits and the mean of their class activation maps plus bias."""

    deviation: float
    tolerance: float


class ParityReport(StrictModel):
    """The comparison of the exported file with its network.

    `spread` is the largest range of a logit over the images; None in float32. `emulation` describes how the
    runtime computed operators for which it has no kernels; None if it ran the file unchanged. `broken` names
    the first violated invariant of `spectral`. The JSON omits `class_maps` unless the file was exported with
    `--with-cam`.
    """

    precision: Precision = "fp32"
    runtime: str
    provider: str
    emulation: str | None = None
    images: int
    floors_allowed: float = FLOORS
    outputs: dict[str, OutputParity]
    spread: float | None = None
    top1: Agreement
    routing: RoutingParity | None = None
    parts: tuple[PartDrift, ...] = ()
    spectral: tuple[SpectralRecord, ...] = ()
    broken: str | None = None
    class_maps: ClassMapParity | None = None
    first_over_floor: str | None = None
    operators: dict[str, int]
    file_bytes: int
    passed: bool
    drift_allowed: bool

    @pydantic.model_serializer(mode="wrap")
    def _omit_class_maps(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return {key: value for key, value in fields.items() if value is not None or key != "class_maps"}

    @property
    def unverifiable(self) -> bool:
        """Whether a file that ignores its input could be within the tolerance.

        Such a file is wrong by at least half of the spread. int8 is exempt: rounding may move a single probe
        far, and agreement with float32 is measured on the calibration or evaluation images instead.
        """
        if self.precision == "int8" or self.spread is None:
            return False
        return self.logits.tolerance >= self.spread / 2

    @property
    def compared_images(self) -> list[int]:
        """The indices of the images whose outputs were compared."""
        left_out = () if self.routing is None else self.routing.left_out
        return [image for image in range(self.images) if image not in left_out]

    @property
    def logits(self) -> OutputParity:
        """The drift of the logits."""
        return self.outputs[LOGITS]


def agreement(
    values: NDArray[Any],
    expected: NDArray[Any],
    tolerance: float,
    rerouted: NDArray[np.bool_] | None = None,
) -> Agreement:
    """Compare the top classes of logits *values* and *expected*, both (P, C).

    *rerouted* (P,) marks images whose gate chose other components.
    """
    rows = np.arange(len(expected))
    network, file = expected.argmax(axis=1), values.argmax(axis=1)
    margin = expected[rows, network] - expected[rows, file]
    flipped = []
    for image in np.flatnonzero(network != file):
        cause: Literal["noise", "routing", "error"] = "noise" if margin[image] <= 2 * tolerance else "error"
        if rerouted is not None and rerouted[image]:
            cause = "routing"
        flipped.append(
            Flip(
                image=int(image),
                network=int(network[image]),
                file=int(file[image]),
                margin=float(margin[image]),
                cause=cause,
            )
        )
    counts = Counter(flip.cause for flip in flipped)
    agree = len(expected) - len(flipped)
    low, high = wilson(agree, len(expected))
    return Agreement(
        images=len(expected),
        agree=agree,
        flips_within_noise=counts["noise"],
        flips_by_routing=counts["routing"],
        flips=counts["error"],
        flipped=tuple(flipped),
        low=low,
        high=high,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The float64 routes of P images through N components.

    `chosen` and `visible` are (P, N); `visible` marks the chosen components whose weight is positive in
    float32. `decided` (P,) marks the images whose `margin` is more than twice the tolerance, `unchanged` (P,)
    those whose route is the same in the network's own run in the exported precision.
    """

    chosen: NDArray[np.bool_]
    visible: NDArray[np.bool_]
    margin: NDArray[np.float64]
    noise_floor: float
    tolerance: float
    decided: NDArray[np.bool_]
    unchanged: NDArray[np.bool_]

    @property
    def comparable(self) -> NDArray[np.bool_]:
        """The images (P,) whose outputs can be compared: `decided`, or `unchanged` if none is decided."""
        return self.decided if self.decided.any() else self.unchanged


def find_gate(network: nn.Module) -> Any:
    """Find the gate of *network*, a layer that declares `is_gate`.

    Returns None unless there is exactly one and its weights are an output of *network*.
    """
    gates = [part for part in network.modules() if export_hints(part).is_gate]
    return gates[0] if len(gates) == 1 and GATES in getattr(network, "outputs", ()) else None


def gate_logits(deployed: Deployed, pixels: Tensor) -> NDArray[Any]:
    """Compute the gate logits (P, N) for *pixels*, in the dtype that *deployed* uses for them."""
    gate = find_gate(deployed.network)
    kept: list[Tensor] = []
    handle = gate.feature.register_forward_hook(
        lambda _part, _inputs, output: kept.append(gate.logits(output))
    )
    try:
        with torch.no_grad():
            deployed(pixels)
    finally:
        handle.remove()
    return kept[0].numpy()


def find_routes(exact: NDArray[Any], own: NDArray[Any], k: int, floors: float) -> Routing:
    """Compute the routes to *k* components from the float64 gate logits *exact* (P, N).

    *own* are the logits in the exported precision; the tolerance is *floors* times their error.
    """
    chosen = _largest(exact, k)
    ranked = -np.sort(-exact, axis=1)
    margin = ranked[:, k - 1] - ranked[:, k] if k < exact.shape[1] else np.full(len(exact), np.inf)
    smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(exact).max())
    noise = max(smallest, float(np.abs(own - exact).max()))
    tolerance = floors * noise
    kept = np.where(chosen, exact, -np.inf)
    kept = kept - kept.max(axis=1, keepdims=True)
    log_weight = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    return Routing(
        chosen=chosen,
        visible=log_weight - 2 * tolerance > np.log(np.finfo(np.float32).tiny),
        margin=margin,
        noise_floor=noise,
        tolerance=tolerance,
        decided=margin > 2 * tolerance,
        unchanged=(_largest(own, k) == chosen).all(axis=1),
    )


def is_decided(logits: NDArray[Any], chosen: int, routing: RoutingParity) -> bool:
    """Return whether rounding cannot change the *chosen* largest of the gate logits (N,) of one image."""
    ranked = -np.sort(-logits)
    return bool((ranked[chosen - 1] - ranked[chosen:] > 2 * routing.tolerance).all())


def _largest(logits: NDArray[Any], k: int) -> NDArray[np.bool_]:
    # A stable sort resolves ties in favor of the lower index, as the gate does.
    order = np.argsort(-logits, axis=1, kind="stable")
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    return chosen


def rerouted(gates: NDArray[Any], routes: Routing) -> NDArray[np.bool_]:
    """Mark the images (P,) that the file routes to other components; *gates* (P, N) are its weights."""
    given = gates > 0
    different: NDArray[np.bool_] = (given & ~routes.chosen) | (~given & routes.visible)
    return np.asarray(different.any(axis=1), dtype=np.bool_)


def compared(other: NDArray[np.bool_], routes: Routing) -> NDArray[np.bool_]:
    """Mark the images (P,) whose outputs are compared; *other* (P,) marks rerouted images."""
    return routes.decided if routes.decided.any() else routes.unchanged & ~other


def routing_parity(other: NDArray[np.bool_], routes: Routing) -> RoutingParity:
    """Summarize the routing; *other* (P,) marks the images rerouted at any batch size."""
    finite = routes.margin[np.isfinite(routes.margin)]
    return RoutingParity(
        noise_floor=routes.noise_floor,
        tolerance=routes.tolerance,
        smallest_margin=float(finite.min()) if len(finite) else 0.0,
        undecided=int((~routes.decided).sum()),
        flips=int((other & ~routes.decided).sum()),
        wrong=int((other & routes.decided).sum()),
        left_out=tuple(int(image) for image in np.flatnonzero(~compared(other, routes))),
        usage=tuple(int(count) for count in routes.chosen.sum(axis=0)),
    )
