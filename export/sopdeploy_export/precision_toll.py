"""What a smaller precision costs in answers, and when that is too much."""

from collections.abc import Sequence
from pathlib import Path

from sopdeploy.errors import ParityError
from sopdeploy.manifest import BatchRange
from sopdeploy.preprocess import Preprocess
from sopdeploy_export.accuracy import labelled, with_labels, without_labels
from sopdeploy_export.int8_ranges import METHODS
from sopdeploy_export.precision_report import Accuracy, Cost, PrecisionReport
from sopdeploy_export.ship import PrecisionOptions, Shipping


def measured(
    shipping: Shipping,
    path: Path,
    labels: tuple[str, ...],
    preprocess: Preprocess,
    batch: BatchRange,
    options: PrecisionOptions,
    *,
    allow_drift: bool,
) -> PrecisionReport:
    """Return the report with what the precision costs in answers; raises `ParityError` over `max_drop`."""
    found: Accuracy
    if options.evaluate is not None:
        dataset = labelled(options.evaluate, labels, preprocess)
        found = with_labels(shipping.certified, path, dataset, batch.maximum)
    elif shipping.calibration is not None:
        found = without_labels(shipping.certified, path, shipping.calibration)
    else:
        return shipping.report
    if found.drop > options.max_drop and not allow_drift:
        what = "agreement with float32" if found.before is None else "top-1"
        raise ParityError(
            f"{options.precision} loses {found.drop:.2f} points of {what} on {found.images} pictures, "
            f"{options.max_drop:g} are allowed (--max-drop){int8_advice(shipping.report)}"
        )
    return shipping.report.model_copy(update={"accuracy": found})


def int8_advice(report: PrecisionReport) -> str:
    """Return which part and which layers cost most in int8 and what to try; empty for another precision."""
    quantisation = report.quantisation
    if quantisation is None:
        return ""
    others = " or ".join(method for method in METHODS if method != quantisation.calibration)
    costs = quantisation.costs[:3]
    if not costs:
        return f"; try --calibration {others}"
    return (
        f"; the part that costs most: {told(quantisation.parts[:1])} of the spread of the logits; "
        f"the layers that cost most: {told(costs)}; "
        f"leave them in float32 with --keep-float {costs[0].part}, or try --calibration {others}"
    )


def told(costs: Sequence[Cost]) -> str:
    """Return *costs* in words."""
    return ", ".join(f"{cost.part} {cost.share:.1%}" for cost in costs)
