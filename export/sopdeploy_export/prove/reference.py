"""The reference of a file: the network in float64, with the noise floors and the route of its gate.

The noise floor of an output is the error of the network's own run in the exported precision. The
float64 run is without torch's fast path. If the float32 run differs from it by more than
`MOST_ROUNDINGS`, either the network enlarges rounding, as some untrained ones do, or its code
computes something else in float32. In float64, weights that are changed by one rounding of float32
tell which; in the second case, the export says so.

The gate of a mixture that is nearly undecided may choose other components after rounding, and
every later number then changes although nothing is wrong. Images for which the margin between
its K-th and next logit is at most twice the tolerance of these logits are left out. If that is
every image, those are compared for which the network's own run in the exported precision
chooses the same components as in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.logit_ranges import LogitRanges, absolute_errors, largest_values
from sopdeploy.bundle.manifest import LOGITS, Precision
from sopdeploy.errors import ParityError
from sopdeploy_export.capture.deployed import Deployed, output_names
from sopdeploy_export.network import attributes_restored, tensors_converted
from sopdeploy_export.runs import (
    FLOAT32_EPS,
    MOST_ROUNDINGS,
    Arrays,
    GateRun,
    InFloat64,
    ReportsFloat32,
    find_gate,
    gate_logits,
    mark_decided,
    run_in_batches,
    run_probes,
    without_fast_path,
)

BATCH_IN_FLOAT64 = 6  # attention in float64 takes 0.1 GB per image of 518 pixels
UNDECIDED = "train longer"
# Four float32 rounding errors, relative to the value.
FOUR_ROUNDINGS = 4 * FLOAT32_EPS
# Errors of a float32 run, relative to the effect of weights that are changed by one rounding: a run
# also rounds each result, and adds many.
MOST_ENLARGED = 64
FLOORS = 16.0
FLOORS_BY_PRECISION: Mapping[Precision, float] = {"fp32": FLOORS, "fp16": 4.0, "int8": 4.0}
_SEED = 20_261_129


class RoutingParity(StrictModel):
    """How clearly the gate of a mixture chooses the components of the probe images.

    The gate chooses the K components of the largest logits. It is undecided on an image if the
    margin between the K-th and the next logit is at most twice `tolerance`, the allowed drift of
    these logits. `num_undecided` counts these images. `left_out` lists the positions of the
    images that are excluded from the drift and from the probes.
    """

    noise_floor: float
    tolerance: float
    num_undecided: int
    left_out: tuple[int, ...] = ()


def compare_routes(
    exact: NDArray[Any], rounded: NDArray[Any], num_chosen: int, floors: float
) -> RoutingParity:
    """Find the images whose route can be compared: the *num_chosen* components of the largest gate logits.

    These are the images on which the gate is decided; if there is none, those for which rounding
    changes no chosen component. All others are `left_out`.

    *exact* and *rounded* are the gate logits (P, N) of P images and N components, in float64 and
    in the exported precision. The noise floor is their largest difference, or four roundings of
    the largest logit to float32 if these are more. The tolerance is *floors* noise floors.
    """
    noise = max(
        FOUR_ROUNDINGS * float(np.abs(exact).max()), float(np.abs(rounded - exact).max())
    )
    is_decided_P = mark_decided(exact, num_chosen, floors * noise)

    # The decided images are compared or, if there are none, those with the same route.
    is_compared_P = is_decided_P
    if not is_decided_P.any():
        is_same = _routes(exact, num_chosen) == _routes(rounded, num_chosen)
        is_compared_P = is_same.all(axis=1)

    return RoutingParity(
        noise_floor=noise,
        tolerance=floors * noise,
        num_undecided=int((~is_decided_P).sum()),
        left_out=tuple(np.flatnonzero(~is_compared_P).tolist()),
    )


def _routes(logits: NDArray[Any], num_chosen: int) -> NDArray[np.intp]:
    """Return the components of the *num_chosen* largest gate *logits* (P, N), ascending (P, num_chosen)."""
    # A stable sort resolves ties in favor of the lower index, as the gate does.
    ranking = np.argsort(-logits, axis=1, kind="stable")
    return np.sort(ranking[:, :num_chosen], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReference:
    """The float64 outputs of the network, its noise floor per output in `precision`, and how its gate decides.

    `unstable` names an output whose noise floor in float32 is more than rounding explains, if there is one.
    `order` names the operators of the network that put values in an order (`find_order`).
    """

    outputs: Arrays
    noise_floor: dict[str, float]
    precision: Precision = "fp32"
    routing: RoutingParity | None = None
    unstable: str | None = None
    order: tuple[str, ...] = ()


def compute_reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    rounded: Sequence[Tensor] | None = None,
    precision: Precision = "fp32",
    gate: GateRun | None = None,
    order: Sequence[str] = (),
) -> ParityReference:
    """Compute the float64 outputs of *deployed* for *images* (P, H, W, 3), and the noise floor.

    *rounded* are the outputs (P, ...) in *precision*, and *gate* computes the gate logits in *precision*;
    by default, both are of *deployed* itself. The noise floor of an output is the largest error
    of *rounded* on the images that are compared (`compare_routes`), or four roundings of the largest
    value of all images to float32 if these are more; `_measure_floor` leaves out classes that a large
    number masks. Raises `ParityError` if outputs are not finite or the route of no image can be compared.
    """
    names = output_names(deployed.network)
    pixels = torch.from_numpy(images)

    gate_layer = find_gate(deployed.network)
    with _in_float64(deployed):
        exact = _run_reversed(deployed, names, images)
        exact_gate = None if gate_layer is None else gate_logits(deployed, pixels)

    # The gate in the exported precision, and which images have a route that can be compared.
    if rounded is None:
        rounded = run_probes(deployed, pixels)
    routing = None
    if gate_layer is not None and exact_gate is not None:
        routing = compare_routes(
            exact=exact_gate,
            rounded=gate_logits(deployed, pixels) if gate is None else gate(pixels),
            num_chosen=gate_layer.chosen,
            floors=FLOORS_BY_PRECISION[precision],
        )
    is_compared_P = compared_images(routing, len(images))
    if not is_compared_P.any():
        raise ParityError(
            "the gate is undecided on every reference image and rounding to "
            f"{precision} changes every route, so no output can be compared; "
            f"{UNDECIDED}"
        )

    # The noise floor of each output.
    noise_floor = {}
    for name, output in zip(names, rounded, strict=True):
        values = output.numpy()
        _require_finite(name, exact[name], values, precision)
        errors = absolute_errors(values, exact[name])[is_compared_P]
        noise_floor[name] = _measure_floor(name, exact[name], errors, precision)

    reference = ParityReference(
        outputs=exact,
        noise_floor=noise_floor,
        precision=precision,
        routing=routing,
        order=tuple(order),
    )
    if precision == "fp32":
        unstable = _find_unstable(deployed, reference, images)
        reference = replace(reference, unstable=unstable)
    return reference


def _measure_floor(
    name: str, exact: NDArray[Any], errors: NDArray[np.float64], precision: Precision
) -> float:
    """Measure the noise floor of output *name*, *exact* (P, ...) in float64, with *errors* of the compared images.

    A class that a large number masks has larger errors. Up to four roundings of its own logits they do not
    count, because they would hide errors of the other classes. Raises `ParityError` if they are larger in a
    reduced precision, and larger than those of the other classes.
    """
    largest = largest_values(exact)
    largest_errors = errors.max(axis=0)
    if name != LOGITS:
        return max(FOUR_ROUNDINGS * float(largest.max()), float(largest_errors.max()))

    # The classes that count.
    is_ordinary_C = LogitRanges.of(exact).is_ordinary
    is_explained_C = largest_errors <= FOUR_ROUNDINGS * largest
    floor = max(
        FOUR_ROUNDINGS * float(largest[is_ordinary_C].max(initial=0.0)),
        float(largest_errors[is_ordinary_C].max(initial=0.0)),
    )
    others = np.where(is_ordinary_C | is_explained_C, 0.0, largest_errors)
    masked = int(others.argmax())
    if precision != "fp32" and others[masked] > floor:
        raise ParityError(
            f"{precision} rounds logit {masked}, which is up to {largest[masked]:.4g}, by {others[masked]:.2g}, and "
            f"the logits of the predicted classes by at most {floor:.2g}; mask classes by -inf or -10000, or choose "
            "precision fp32"
        )
    return max(floor, float(others[masked]))


def _find_unstable(
    deployed: Deployed, reference: ParityReference, images: NDArray[np.uint8]
) -> str | None:
    """Find an output whose noise floor in float32 is not rounding.

    The floor is thousands of roundings, and one rounding of the weights changes the output much less. Of the
    logits, these are roundings of their range over the images, or `LogitRanges.rounding`, without masked classes.
    """
    exact = reference.outputs
    ranges = LogitRanges.of(exact[LOGITS])
    counts_C = ranges.is_ordinary

    # What rounding explains.
    limits = {
        name: MOST_ROUNDINGS * FLOAT32_EPS * float(largest_values(values).max())
        for name, values in exact.items()
    }
    limits[LOGITS] = max(
        MOST_ROUNDINGS * FLOAT32_EPS * float(ranges.spread[counts_C].max(initial=0.0)),
        float(ranges.rounding[counts_C].max(initial=0.0)),
    )
    large = [name for name, floor in reference.noise_floor.items() if floor > limits[name]]
    if not large:
        return None

    with _in_float64(deployed, _changed_by_rounding):
        changed = _run_reversed(deployed, output_names(deployed.network), images)
    is_compared_P = compared_images(reference.routing, len(images))
    for name in large:
        errors = absolute_errors(changed[name], exact[name])[is_compared_P]
        if name == LOGITS:
            errors = errors[:, counts_C]
        enlarged = float(errors.max(initial=0.0))
        if reference.noise_floor[name] > MOST_ENLARGED * enlarged:
            return name
    return None


def _run_reversed(
    deployed: Deployed, names: Sequence[str], images: NDArray[np.uint8]
) -> Arrays:
    """Run *images* (P, H, W, 3) in reverse, so that each has other neighbors than in float32.

    Returns the outputs (P, ...) by name, in the order of *images*.
    """
    outputs = run_in_batches(deployed, names, images[::-1].copy(), BATCH_IN_FLOAT64)
    return {name: rows[::-1] for name, rows in outputs.items()}


@contextmanager
def _in_float64(
    deployed: Deployed, change: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[None]:
    """Let *deployed* compute in float64 in the block, with weights and buffers that *change* makes of its own.

    The modes also change the types that the network's code names, and the dtypes that it reads.
    Buffers, which the network may write to, are in float64; a weight becomes so where it is read.
    """
    weights = {weight.data_ptr() for weight in deployed.parameters()}

    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        changed = change(tensor)
        return changed if tensor.data_ptr() in weights else changed.double()

    with (
        attributes_restored(deployed),
        tensors_converted(deployed, convert),
        without_fast_path(),
        ReportsFloat32(),
        InFloat64(),  # type: ignore[no-untyped-call]
    ):
        yield


def _changed_by_rounding(tensor: Tensor) -> Tensor:
    """Change each number of *tensor* by one rounding of float32, up or down."""
    generator = torch.Generator().manual_seed(_SEED)
    signs = 2 * torch.randint(0, 2, tensor.shape, generator=generator) - 1
    return tensor * (1 + FLOAT32_EPS * signs)


def _require_finite(
    name: str, exact: NDArray[Any], rounded: NDArray[Any], precision: Precision
) -> None:
    """Raise `ParityError` unless output *name* is finite: *exact* in float64, *rounded* in *precision*.

    Logits of a class that are minus infinity for all images, in both, are accepted.
    """
    if name == LOGITS:
        is_masked_C = np.isneginf(exact).all(axis=0)
        exact, rounded = exact[:, ~is_masked_C], rounded[:, ~is_masked_C]

    if not np.isfinite(exact).all():
        raise ParityError(
            f"the network's own {name} are not finite on the reference images; train it again"
        )
    if not np.isfinite(rounded).all():
        if precision == "fp32":
            remedy = "train it again with weight decay or a lower learning rate"
        else:
            remedy = "choose precision fp32"
        raise ParityError(
            f"the network's own {name} are not finite in {precision} on the reference images: activations "
            f"overflow; {remedy}"
        )


def compared_images(routing: RoutingParity | None, count: int) -> NDArray[np.bool_]:
    """Mark those of *count* images (P,) whose outputs are compared: *routing* does not leave them out."""
    is_compared_P = np.ones(count, dtype=np.bool_)
    if routing is not None:
        is_compared_P[list(routing.left_out)] = False
    return is_compared_P
