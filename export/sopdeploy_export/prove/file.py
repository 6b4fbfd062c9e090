"""File: the file, loaded from disk, differs from the network in float64 by rounding only.

The file runs in ONNX Runtime, with the graph optimizations used for serving. The reference is
the network in float64, with its noise floors (`reference`). Every output must stay within its
tolerance at every tested batch size. A changed top class is an error unless the network's margin
is so small that rounding can change it.

Tolerances are multiples of the noise floor: 16 in float32, where reordered sums and folded
batch norms cause 1 to 4; 4 in a reduced precision, whose rounding the floor contains.

Images other than the probes are not compared.

Refused: a file in which the gate of GM-SOP chooses other experts than the network
(`test_another_form_than_the_dense_one_is_refused`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.logit_ranges import LogitRanges, absolute_errors, beyond_rounding
from sopdeploy.bundle.manifest import LOGITS, BatchRange, Precision
from sopdeploy.errors import ParityError, shorten
from sopdeploy_export.prove.reference import (
    FLOORS,
    FLOORS_BY_PRECISION,
    UNDECIDED,
    ParityReference,
    RoutingParity,
    compared_images,
)
from sopdeploy_export.runs import (
    LARGEST_BATCH,
    PROVIDER,
    SINGLE_PROBES,
    Arrays,
    file_outputs,
)

STATEMENT = (
    "The outputs of the ONNX file differ from the network in float64 by at most 16 times the network's own "
    "rounding error in float32, or 4 times its error in a reduced precision. No predicted class changes, unless "
    "rounding explains the change."
)
IS_PROVED = False

FlipCause = Literal["noise", "routing", "error"]


class OutputParity(StrictModel):
    """The drift of one output, in the units of that output.

    `drift` maps each batch size to the maximum absolute difference from the float64 network;
    `batch_difference` is the maximum change caused by batching. A logit that a large number masks counts
    only beyond the rounding of this number (`LogitRanges`).
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
        """The maximum drift in multiples of the noise floor; if this is 0, infinity for any drift but 0."""
        if self.noise_floor == 0:  # the output does not depend on the image
            return math.inf if self.largest_drift else 0.0
        return self.largest_drift / self.noise_floor


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
    def differing(self) -> str | None:
        """The first output whose drift exceeds its tolerance, if there is one."""
        for name, output in self.outputs.items():
            if output.largest_drift > output.tolerance:
                return name
        return None

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


class FileContent(NamedTuple):
    """What a report says of a file: how often it has each operator, and its bytes with its weights."""

    operators: Mapping[str, int]
    num_bytes: int

    @classmethod
    def of(cls, model: onnx.ModelProto, num_bytes: int) -> Self:
        """Describe a file of *num_bytes* with the nodes of *model*."""
        counts = Counter(node.op_type for node in model.graph.node)
        return cls(dict(sorted(counts.items())), num_bytes)


def prove_file(
    session: ort.InferenceSession,
    content: FileContent,
    expected: ParityReference,
    images: NDArray[np.uint8],
    batch: BatchRange,
    *,
    ran: Mapping[int, Arrays] | None = None,
    allow_numerical_error: bool = False,
) -> ParityReport:
    """Compare the file that *session* has loaded with *expected* on uint8 *images* (P, H, W, 3).

    *content* is reported. All images run in batches of `LARGEST_BATCH`, and the last ones in batches of 1,
    of 2 and of the optimum of *batch*, as far as *batch* accepts these sizes. *ran* has the outputs by
    batch size, as far as they are known. Larger batches do not run. Raises `ParityError` if the file
    rejects one of these sizes, or returns another shape or values that are not finite. Also raises it,
    unless *allow_numerical_error* is set, if

    - two runs of the network itself differ by more than rounding,
    - the noise floor is so large that a file which ignores its input would pass,
    - an output differs from *expected*, or between batch sizes, by more than its tolerance, or
    - a class changed despite a clear margin.

    With *allow_numerical_error*, `drift_allowed` of the report says that one of these limits was exceeded.
    """
    # Batches of the main size have all images, and the others the last ones.
    main_size = min(LARGEST_BATCH, batch.maximum)
    others = {1, min(2, batch.maximum), batch.optimum} - {main_size}
    by_size = {} if ran is None else dict(ran)
    for size in {*others, main_size} - by_size.keys():
        images_of_size = images if size == main_size else images[-SINGLE_PROBES:]
        by_size[size] = file_outputs(session, images_of_size, size)
    by_size = dict(sorted(by_size.items()))

    # The images that are compared. Left out are those on which the gate of a mixture may choose
    # other components in the file (`compare_routes`): their outputs may differ by more than
    # rounding.
    routing = expected.routing
    is_compared_P = compared_images(routing, len(images))

    # What the file computes, compared with the network.
    outputs = {
        name: _compare_output(name, expected, by_size, main_size, is_compared_P)
        for name in expected.outputs
    }
    logits = expected.outputs[LOGITS]
    logits_of_file = by_size[main_size][LOGITS]  # of all images
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
        operators=content.operators,
        file_bytes=content.num_bytes,
        drift_allowed=False,
    )

    # Refuse what exceeds a limit, unless the user allowed it.
    problem = _describe_problem(report, expected)
    if problem is None:
        return report
    if allow_numerical_error:
        return report.model_copy(update={"drift_allowed": True})
    raise _refusal(problem, report, expected, by_size.values(), is_compared_P)


def _refusal(
    problem: str,
    report: ParityReport,
    expected: ParityReference,
    runs: Iterable[Arrays],
    is_compared_P: NDArray[np.bool_],
) -> ParityError:
    """Return the error of a file with *problem*, with advice if an operator that orders values explains it.

    It does if a numerical error of the file is the problem, and at least half of the images that
    are compared have no such error in any of *runs*.
    """
    problem += "; nothing was written"
    name = report.differing
    is_numerical_error = expected.unstable is None and not report.unverifiable
    if not expected.order or name is None or not is_numerical_error:
        return ParityError(problem)

    # The images without such an error.
    differs_P = _mark_differing(name, expected, runs, report.outputs[name].tolerance)
    num_compared = is_compared_P.sum()
    num_agreeing = (is_compared_P & ~differs_P).sum()
    if 2 * num_agreeing < num_compared:
        return ParityError(problem)
    return ParityError(
        f"{problem}; {num_agreeing} of {num_compared} images agree, so rounding probably decides what "
        f"{shorten(expected.order)} chooses among nearly equal values, as of an untrained network or a plain "
        "image: train longer, or accept this",
        remedies={"allow_numerical_error": True},
    )


def _describe_problem(report: ParityReport, expected: ParityReference) -> str | None:
    """Describe what exceeds a limit, in the runs of the network or in *report*; None if nothing does."""
    if expected.unstable is not None:
        floor = expected.noise_floor[expected.unstable]
        return (
            f"two runs of the network differ by {floor:.3g} in {expected.unstable}, in float32 and in "
            "float64, which is more than rounding explains; its code must not depend on the batch size, "
            "on the place of an image in its batch, or on the type of numbers, and must not subtract large "
            "numbers that are nearly equal"
        )

    violation = _first_violation(report)
    if violation is None:
        return None
    problem = f"the exported file {violation}"
    routing = report.routing
    if routing is not None and routing.num_undecided == report.num_images:
        problem += f"; the gate is undecided on every image, so rounding decides: {UNDECIDED}"
    return problem


def _mark_differing(
    name: str, expected: ParityReference, runs: Iterable[Arrays], tolerance: float
) -> NDArray[np.bool_]:
    """Mark the images (P,) for which output *name* of one of *runs* differs by more than *tolerance*.

    Each of *runs* has the outputs of the file for all P images, or for the last ones.
    """
    exact = expected.outputs[name]
    differs_P = np.zeros(len(exact), dtype=np.bool_)
    for outputs in runs:
        values = outputs[name]
        count = len(values)
        errors = absolute_errors(values, exact[-count:])
        if name == LOGITS:
            errors = beyond_rounding(errors, LogitRanges.of(exact).masked_rounding, tolerance)
        differs_P[-count:] |= (errors.reshape(count, -1) > tolerance).any(axis=1)
    return differs_P


def _compare_output(
    name: str,
    expected: ParityReference,
    by_size: Mapping[int, Arrays],
    main_size: int,
    is_compared_P: NDArray[np.bool_],
) -> OutputParity:
    """Measure how far output *name* of the file is from the network, and its batches from each other.

    *by_size* has the outputs of the file by batch size: of *main_size* for all P
    images, of the other sizes for the last ones. Raises the errors of `file_errors`.
    """
    # For each batch size, the drift from the network, and from the run of all images.
    exact = expected.outputs[name]
    masked_rounding = np.zeros(exact.shape[1:])
    if name == LOGITS:
        masked_rounding = LogitRanges.of(exact).masked_rounding
    noise_floor = expected.noise_floor[name]
    tolerance = FLOORS_BY_PRECISION[expected.precision] * noise_floor
    all_of_file = by_size[main_size][name]
    drift = {}
    batch_difference = 0.0
    for size, outputs in by_size.items():
        values = outputs[name]
        count = len(values)
        is_compared = is_compared_P[-count:]
        from_network, from_batch = (
            beyond_rounding(
                file_errors(name, values, reference[-count:])[is_compared],
                masked_rounding,
                tolerance,
            ).max(initial=0.0)
            for reference in (exact, all_of_file)
        )
        drift[str(size)] = float(from_network)
        batch_difference = max(batch_difference, float(from_batch))

    return OutputParity(
        noise_floor=noise_floor,
        tolerance=tolerance,
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
    the largest range. Classes that a large number masks do not count.
    """
    ordinary = logits[:, LogitRanges.of(logits).is_ordinary]
    return float(np.ptp(ordinary, axis=0 if len(logits) > 1 else 1).max(initial=0.0))


def file_errors(name: str, values: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the absolute differences between *values* and *expected*, both (P, ...).

    *values* are those of the file for output *name*. Raises `ParityError` if the shapes differ or
    *values* are not finite, unless *expected* is minus infinity there, too.
    """
    if values.shape != expected.shape:
        raise ParityError(
            f"the exported file returns {name} of shape {values.shape}, not {expected.shape}"
        )
    errors = absolute_errors(values, expected)
    if not np.isfinite(errors).all():
        raise ParityError(f"the exported file returns {name} that are not finite")
    return errors


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
            f"{floor:.3g} is {100 * floor / report.spread:.0f} % of the spread of the "
            f"logits, and at {100 * too_large_share:.1f} % or more a file that ignores its "
            f"input would pass; {advice}"
        )

    # The file.
    if report.differing is not None:
        output = report.outputs[report.differing]
        return (
            f"differs by {output.largest_drift:.3g} in {report.differing} from float64 "
            f"({output.drift_in_floors:.1f} times the network's rounding error, limit "
            f"{report.floors_allowed:.0f} times = {output.tolerance:.3g})"
        )
    for name, output in report.outputs.items():
        if output.batch_difference > output.tolerance:
            return f"changes {name} by {output.batch_difference:.3g} when images are batched"
    if report.flips["error"]:
        return f"changes the top class of {report.flips['error']} of {report.num_images} images"
    return None
