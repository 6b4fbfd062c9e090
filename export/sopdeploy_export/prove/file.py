"""File: the file, loaded from disk, differs from the network in float64 by rounding only.

The file runs in ONNX Runtime, with the graph optimizations used for serving. The reference is
the network in float64. The noise floor is the error of the network's own run in the exported
precision. Every output must stay within its tolerance at every tested batch size, and must not
depend on the other images of the batch. A changed top class is an error unless the network's
margin is so small that rounding can change it.

The float32 run of the network and the float64 one are without torch's fast path. If they differ by
more than `MOST_ROUNDINGS`, either the network enlarges rounding, as some untrained ones do, or its
code computes something else in float32. In float64, weights that are changed by one rounding of
float32 tell which; in the second case, the export says so.

Tolerances are multiples of the noise floor: 16 in float32, where reordered sums and folded
batch norms cause 1 to 4; 4 in a reduced precision, whose rounding the floor contains.

The gate of a mixture that is nearly undecided may choose other components after rounding, and
every later number then changes although nothing is wrong. Images for which the margin between
its K-th and next logit is at most twice the tolerance of these logits are left out. If that is
every image, those are compared for which the network's own run in the exported precision
chooses the same components as in float64.

Images other than the probes are not compared.

Refused: a file in which the gate of GM-SOP chooses other experts than the network
(`test_another_form_than_the_dense_one_is_refused`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.bundle.manifest import BatchRange, Precision
from sopdeploy.config import StrictModel
from sopdeploy.errors import ParityError, shorten
from sopdeploy_export.capture.deployed import Deployed, output_names
from sopdeploy_export.network import attributes_restored, tensors_converted
from sopdeploy_export.runs import (
    LOGITS,
    MOST_ROUNDINGS,
    PROVIDER,
    SINGLE_PROBES,
    Arrays,
    GateRun,
    InFloat64,
    ReportsFloat32,
    file_outputs,
    find_gate,
    gate_logits,
    mark_decided,
    run_in_batches,
    run_probes,
    without_fast_path,
)

STATEMENT = (
    "The outputs of the ONNX file differ from the network in float64 by at most 16 times the network's own "
    "rounding error in float32, or 4 times its error in a reduced precision. No predicted class changes, unless "
    "rounding explains the change."
)
IS_PROVED = False

# An odd size above the number of generated images; larger ones take more time and memory.
LARGEST_BATCH = 7
BATCH_IN_FLOAT64 = 6  # attention in float64 takes 0.1 GB per image of 518 pixels
UNDECIDED = "train longer"
# Four float32 rounding errors, relative to the value.
FLOAT32_EPS = float(np.finfo(np.float32).eps)
FOUR_ROUNDINGS = 4 * FLOAT32_EPS
# Errors of a float32 run, relative to the effect of weights that are changed by one rounding: a run
# also rounds each result, and adds many.
MOST_ENLARGED = 64
_SEED = 20_261_129

FlipCause = Literal["noise", "routing", "error"]
FLOORS = 16.0
FLOORS_BY_PRECISION: Mapping[Precision, float] = {"fp32": FLOORS, "fp16": 4.0, "int8": 4.0}


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
        return self.in_floors(self.largest_drift)

    def in_floors(self, drift: float) -> float:
        """Return *drift* in multiples of the noise floor; if this is 0, infinity for any drift but 0."""
        if self.noise_floor == 0:  # the output does not depend on the image
            return math.inf if drift else 0.0
        return drift / self.noise_floor


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


class ParityReport(StrictModel):
    """The comparison of the exported file with its network, the content of `parity.json`.

    `spread` is the largest range of a logit over the images. `flips` counts changed top classes
    by cause: `routing` for images that are excluded for their route, `noise` if the network's
    margin between the two classes is at most twice the tolerance, otherwise `error`.
    `drift_allowed` says that a limit was exceeded and the user allowed it.
    """

    precision: Precision = "fp32"
    runtime: str
    provider: str
    num_images: int
    floors_allowed: float = FLOORS
    outputs: dict[str, OutputParity]
    spread: float
    flips: dict[FlipCause, int]
    routing: RoutingParity | None = None
    operators: dict[str, int]
    file_bytes: int
    drift_allowed: bool

    @property
    def passed(self) -> bool:
        """Whether all outputs are within their limits."""
        # `drift_allowed` is true only if a limit was exceeded and the user allowed this; without
        # the permission, the export fails.
        return not self.drift_allowed

    @property
    def num_agreeing(self) -> int:
        """The number of images with the network's top class."""
        return self.num_images - sum(self.flips.values())

    @property
    def unverifiable(self) -> bool:
        """Whether a file that returns the same logits for every image could be within the tolerance.

        A constant differs by at least half of a range from one of its ends. int8 is exempt:
        rounding may move a single probe far, so agreement with float32 is measured on
        calibration or evaluation images instead.
        """
        return self.precision != "int8" and self.logits.tolerance >= self.spread / 2

    @property
    def smallest_unverifiable_share(self) -> float:
        """The smallest ratio of the noise floor to the spread with which the file is `unverifiable`.

        At this ratio, the tolerance, floors_allowed * floor, is spread / 2.
        """
        return 0.5 / self.floors_allowed

    @property
    def logits(self) -> OutputParity:
        """The drift of the logits."""
        return self.outputs[LOGITS]


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
    """

    outputs: Arrays
    noise_floor: dict[str, float]
    precision: Precision = "fp32"
    routing: RoutingParity | None = None
    unstable: str | None = None


def compute_reference(
    deployed: Deployed,
    images: NDArray[np.uint8],
    rounded: Sequence[Tensor] | None = None,
    precision: Precision = "fp32",
    gate: GateRun | None = None,
) -> ParityReference:
    """Compute the float64 outputs of *deployed* for *images* (P, H, W, 3), and the noise floor.

    *rounded* are the outputs (P, ...) in *precision*, and *gate* computes the gate logits in *precision*;
    by default, both are of *deployed* itself. The noise floor of an output is the largest error
    of *rounded* on the images that are compared (`compare_routes`), or four roundings of the largest
    value of all images to float32 if these are more. Raises
    `ParityError` if outputs are not finite or the route of no image can be compared.
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
        errors = np.abs(values - exact[name])[is_compared_P]
        smallest = FOUR_ROUNDINGS * float(np.abs(exact[name]).max())
        noise_floor[name] = max(smallest, float(errors.max()))

    reference = ParityReference(
        outputs=exact, noise_floor=noise_floor, precision=precision, routing=routing
    )
    if precision == "fp32":
        unstable = _find_unstable(deployed, reference, images)
        reference = replace(reference, unstable=unstable)
    return reference


def _find_unstable(
    deployed: Deployed, reference: ParityReference, images: NDArray[np.uint8]
) -> str | None:
    """Find an output whose noise floor in float32 is no rounding.

    The floor is thousands of roundings, and one rounding of the weights changes the output much less.
    """
    exact = reference.outputs
    large = [
        name
        for name, floor in reference.noise_floor.items()
        if floor > MOST_ROUNDINGS * FLOAT32_EPS * float(np.abs(exact[name]).max())
    ]
    if not large:
        return None

    with _in_float64(deployed, _changed_by_rounding):
        changed = _run_reversed(deployed, output_names(deployed.network), images)
    is_compared_P = compared_images(reference.routing, len(images))
    for name in large:
        enlarged = float(np.abs(changed[name] - exact[name])[is_compared_P].max())
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
    """Raise `ParityError` unless output *name* is finite: *exact* in float64, *rounded* in *precision*."""
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


def prove_file(
    session: ort.InferenceSession,
    model: onnx.ModelProto,
    expected: ParityReference,
    images: NDArray[np.uint8],
    batch: BatchRange,
    *,
    allow_numerical_error: bool = False,
    order: Sequence[str] = (),
) -> ParityReport:
    """Compare the file that *session* has loaded with *expected* on uint8 *images* (P, H, W, 3).

    *model* is the content of the file; its operators and its size are reported. *order* names the
    operators of the network that put values in an order (`find_order`). Raises
    `ParityError` if the file rejects a batch size of *batch*, or returns another shape or values
    that are not finite. Also raises it, unless *allow_numerical_error* is set, if

    - two runs of the network itself differ by more than rounding,
    - the noise floor is so large that a file which ignores its input would pass,
    - an output differs from *expected*, or between batch sizes, by more than its tolerance, or
    - a class changed despite a clear margin.

    With *allow_numerical_error*, `drift_allowed` of the report says that one of these limits was exceeded.
    """
    # Below the maximum, which is mostly even: an odd size detects a graph that works for even sizes
    # only.
    below_maximum = max(min(batch.maximum - 1, LARGEST_BATCH), 1)
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, below_maximum})

    # All images run in batches of the largest size, and the last ones in batches
    # of the others. `counts` has the number of images for each size.
    largest_size = sizes[-1]
    counts = {size: max(size, SINGLE_PROBES) for size in sizes} | {largest_size: len(images)}
    by_size = {
        size: file_outputs(session, images[-count:], size) for size, count in counts.items()
    }

    # The images that are compared. Left out are those on which the gate of a mixture may choose
    # other components in the file (`compare_routes`): their outputs may differ by more than
    # rounding.
    routing = expected.routing
    is_compared_P = compared_images(routing, len(images))

    # What the file computes, compared with the network.
    outputs = {
        name: _compare_output(name, expected, by_size, largest_size, is_compared_P)
        for name in expected.outputs
    }
    logits = expected.outputs[LOGITS]
    logits_of_file = by_size[largest_size][LOGITS]  # of all images
    report = ParityReport(
        precision=expected.precision,
        runtime=f"onnxruntime {ort.__version__}",
        provider=PROVIDER,
        num_images=len(images),
        floors_allowed=FLOORS_BY_PRECISION[expected.precision],
        outputs=outputs,
        spread=logit_spread(logits[is_compared_P]),
        flips=count_flips(
            logits_of_file, logits, outputs[LOGITS].tolerance, left_out=~is_compared_P
        ),
        routing=routing,
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        file_bytes=model.ByteSize(),
        drift_allowed=False,
    )

    # Refuse what exceeds a limit, unless the user allowed it.
    violation = _first_violation(report)
    problem = None
    if expected.unstable is not None:
        floor = expected.noise_floor[expected.unstable]
        problem = (
            f"two runs of the network differ by {floor:.3g} in {expected.unstable}, in float32 and in "
            "float64, which is more than rounding explains; its code must not depend on the batch size, "
            "on the place of an image in its batch, or on the type of numbers"
        )
    elif violation is not None:
        problem = f"the exported file {violation}"
        if routing is not None and routing.num_undecided == report.num_images:
            problem += (
                f"; the gate is undecided on every image, so rounding decides: {UNDECIDED}"
            )

    if problem is None:
        return report
    if allow_numerical_error:
        return report.model_copy(update={"drift_allowed": True})
    if order:
        raise ParityError(
            f"{problem}; nothing was written; rounding can decide what {shorten(order)} chooses among "
            "nearly equal values, as of an untrained network or a plain image: train longer, or accept this",
            remedies={"allow_numerical_error": True},
        )
    raise ParityError(f"{problem}; nothing was written")


def _compare_output(
    name: str,
    expected: ParityReference,
    by_size: Mapping[int, Arrays],
    largest_size: int,
    is_compared_P: NDArray[np.bool_],
) -> OutputParity:
    """Measure how far output *name* of the file is from the network, and its batches from each other.

    *by_size* has the outputs of the file by batch size: those of *largest_size* for all P
    images, those of the others for the last ones. Raises the errors of `max_drift`.
    """
    # For each batch size, the drift from the network, and from the run in the largest batches.
    exact = expected.outputs[name]
    all_of_file = by_size[largest_size][name]
    drift = {}
    batch_difference = 0.0
    for size, outputs in by_size.items():
        values = outputs[name]
        count = len(values)
        is_compared = is_compared_P[-count:]
        drift[str(size)] = max_drift(name, values, exact[-count:], is_compared)
        difference = max_drift(name, values, all_of_file[-count:], is_compared)
        batch_difference = max(batch_difference, difference)

    noise_floor = expected.noise_floor[name]
    return OutputParity(
        noise_floor=noise_floor,
        tolerance=FLOORS_BY_PRECISION[expected.precision] * noise_floor,
        drift=drift,
        batch_difference=batch_difference,
    )


def count_flips(
    values: NDArray[Any], expected: NDArray[Any], tolerance: float, left_out: NDArray[np.bool_]
) -> dict[FlipCause, int]:
    """Count the top classes that differ between logits *values* and *expected*, both (P, C), by cause.

    *left_out* (P,) marks the images that are not compared: the gate may choose otherwise there.
    """
    top_of_network_P = expected.argmax(axis=1)
    top_of_file_P = values.argmax(axis=1)
    is_flipped_P = top_of_network_P != top_of_file_P

    # The margin of the network between the two classes. Both logits may drift, towards each other.
    images = np.arange(len(expected))
    margins_P = expected[images, top_of_network_P] - expected[images, top_of_file_P]
    is_small_P = margins_P <= 2 * tolerance

    by_cause: dict[FlipCause, NDArray[np.bool_]] = {
        "noise": is_small_P & ~left_out,
        "routing": left_out,
        "error": ~is_small_P & ~left_out,
    }
    return {cause: int((mask & is_flipped_P).sum()) for cause, mask in by_cause.items()}


def logit_spread(logits: NDArray[Any]) -> float:
    """Return the spread of *logits* (P, C): the largest range, over the images, of the logit of a class.

    For a single image, it is the range over its classes. The tolerance must be below half of the
    spread: a file that returns the middle of each range for every image has an error of half of
    the largest range.
    """
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def max_drift(
    name: str, values: NDArray[Any], expected: NDArray[Any], compared: NDArray[np.bool_]
) -> float:
    """Compute the maximum absolute difference between *values* and *expected* over the *compared* images (P,).

    *values* are those of the file for output *name*. Raises `ParityError` if the shapes differ or
    *values* are not finite.
    """
    if values.shape != expected.shape:
        raise ParityError(
            f"the exported file gives {name} of shape {values.shape}, not {expected.shape}"
        )
    if not np.isfinite(values).all():
        raise ParityError(f"the exported file gives {name} that are not finite")
    return float(np.abs(values.astype(np.float64) - expected)[compared].max(initial=0.0))


def _first_violation(report: ParityReport) -> str | None:
    """Describe the first limit that *report* exceeds, if any; causes are checked before their effects."""
    # The network: its logits hardly depend on the image.
    if report.unverifiable:
        if report.spread == 0:
            return "cannot be verified: the spread of the network's logits is 0; train longer"
        floor = report.logits.noise_floor
        advice = "train longer"
        if report.precision != "fp32":
            advice += ", or choose precision fp32"
        too_large_share = report.smallest_unverifiable_share
        return (
            f"cannot be verified in {report.precision}: its rounding error of "
            f"{floor:.3g} is {floor / report.spread:.0%} of the spread of the "
            f"logits, and at {too_large_share:.1%} or more a file that ignores its "
            f"input would pass; {advice}"
        )

    # The file.
    for name, output in report.outputs.items():
        if output.largest_drift > output.tolerance:
            return (
                f"differs by {output.largest_drift:.3g} in {name} from float64 "
                f"({output.drift_in_floors:.1f} times the network's rounding error, limit "
                f"{report.floors_allowed:.0f} times = {output.tolerance:.3g})"
            )
        if output.batch_difference > output.tolerance:
            return f"changes {name} by {output.batch_difference:.3g} when images are batched"
    if report.flips["error"]:
        return f"changes the top class of {report.flips['error']} of {report.num_images} images"
    return None
