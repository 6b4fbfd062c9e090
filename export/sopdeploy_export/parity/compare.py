"""Compare the exported ONNX file, loaded from disk, with the network it was exported from.

Every output must stay within its tolerance at every tested batch size and must not depend on the batch. A
changed top class or gate route is an error where the network's margin was clear. If the comparison fails,
*locate* names the first module that is wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ParityError
from sopdeploy_export.parity.reference import UNDECIDED, Reference
from sopdeploy_export.parity.report import (
    GATES,
    LOGITS,
    PROVIDER,
    OutputParity,
    ParityReport,
    SpectralRecord,
    agreement,
)
from sopdeploy_export.parity.routing import compared, rerouted, routing_parity
from sopdeploy_export.parity.session import EMULATION, file_outputs, has_bfloat16, open_session
from sopdeploy_export.parity.spectral import violation

Locate = Callable[[Path], str | None]


def compare(
    path: Path,
    expected: Reference,
    images: NDArray[np.uint8],
    batch: BatchRange,
    operators: dict[str, int],
    *,
    allow_drift: bool = False,
    locate: Locate = lambda _: None,
) -> ParityReport:
    """Compare the ONNX file at *path* with *expected* on uint8 *images* (P, H, W, 3).

    Raises `ParityError` if an output exceeds its tolerance or is not finite, or if a class or route changed
    despite a clear margin. *allow_drift* records these errors in the report instead; values that are not
    finite always raise.
    """
    session = open_session(path)
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, max(1, batch.maximum - 1)})
    found = {size: file_outputs(session, images, size) for size in sizes}
    routes, other = expected.routing, np.zeros(len(images), dtype=bool)
    if routes is not None:
        other = np.any([rerouted(outputs[GATES], routes) for outputs in found.values()], axis=0)
    kept = compared(other, routes) if routes is not None else ~other
    outputs = {}
    for name, exact in expected.outputs.items():
        tolerance = expected.floors * expected.noise_floor[name]
        outputs[name] = OutputParity(
            noise_floor=expected.noise_floor[name],
            tolerance=tolerance,
            drift={str(size): max_drift(name, values[name], exact, kept) for size, values in found.items()},
            alone_or_in_batch=max(
                max_drift(name, values[name], found[1][name], kept) for values in found.values()
            ),
        )
    if not kept.any():
        raise ParityError(f"the exported file sends every image to other components; {UNDECIDED}")
    top1 = agreement(found[1][LOGITS], expected.outputs[LOGITS], outputs[LOGITS].tolerance, ~kept)
    routing = None if routes is None else routing_parity(other, routes)
    passed = (
        all(max(o.largest_drift, o.alone_or_in_batch) <= o.tolerance for o in outputs.values())
        and top1.flips == 0
        and (routing is None or routing.wrong == 0)
    )
    report = ParityReport(
        precision=expected.precision,
        runtime=f"onnxruntime {ort.__version__}",
        provider=PROVIDER,
        emulation=EMULATION if has_bfloat16(onnx.load(path)) else None,
        images=len(images),
        floors_allowed=expected.floors,
        outputs=outputs,
        spread=logit_spread(expected.outputs[LOGITS][kept]) if expected.precision != "fp32" else None,
        top1=top1,
        routing=routing,
        first_over_floor=None if passed else locate(path),
        operators=operators,
        file_bytes=path.stat().st_size,
        passed=passed,
        drift_allowed=allow_drift and not passed,
    )
    if report.vacuous:
        report = report.model_copy(update={"passed": False, "drift_allowed": allow_drift})
    if not report.passed and not allow_drift:
        raise ParityError(_error_message(report))
    return report


def logit_spread(logits: NDArray[Any]) -> float:
    """Compute the largest range of a class over images for (P, C) *logits*; over classes if P is 1.

    A file that gives the same logits for every image is wrong by at least half of it.
    """
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def add_spectral_records(
    report: ParityReport, records: tuple[SpectralRecord, ...], *, allow_drift: bool
) -> ParityReport:
    """Add the *records* of second-order modules to *report*.

    Raises `ParityError` if a record violates an invariant, unless *allow_drift*.
    """
    broken = violation(records)
    passed = report.passed and broken is None
    checked = report.model_copy(
        update={
            "spectral": records,
            "broken": broken,
            "passed": passed,
            "drift_allowed": allow_drift and not passed,
        }
    )
    if broken is not None and not allow_drift:
        raise ParityError(_error_message(checked))
    return checked


def max_drift(name: str, values: NDArray[Any], expected: NDArray[Any], kept: NDArray[np.bool_]) -> float:
    """Compute the maximum absolute difference over the *kept* images (P,).

    Raises `ParityError` if the shapes differ or *values* are not finite.
    """
    if values.shape != expected.shape:
        raise ParityError(f"the exported file gives {name} of shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError(f"the exported file gives {name} that are not finite")
    return float(np.abs(values.astype(np.float64) - expected)[kept].max(initial=0.0))


def _error_message(report: ParityReport) -> str:
    what = f"changes the top class of {report.top1.flips} of {report.images} images"
    for name, output in report.outputs.items():
        if output.largest_drift > output.tolerance:
            what = (
                f"drifts by {output.largest_drift:.3g} in {name} ({output.drift_in_floors:.1f}x noise floor, "
                f"limit {report.floors_allowed:.0f}x = {output.tolerance:.3g})"
            )
        elif output.alone_or_in_batch > output.tolerance:
            what = f"changes {name} by {output.alone_or_in_batch:.3g} when images are batched"
    routing = report.routing
    if routing is not None and routing.wrong:
        what = f"routes {routing.wrong} of {report.images} images to components that the gate did not choose"
    if report.vacuous:
        floor = report.logits.noise_floor
        what = (
            f"cannot be verified in {report.precision}: its noise floor of {floor:.3g} is "
            f"{floor / max(report.spread or 0.0, floor * 1e-6):.0%} of the spread of the logits; from "
            f"{0.5 / report.floors_allowed:.1%} on, a file that ignores its input would pass; train longer, "
            "or choose --precision fp32"
        )
    if report.broken is not None:
        what = f"violates an invariant of a second-order module: {report.broken}"
    if report.first_over_floor is not None:
        what += f"; {report.first_over_floor}"
    elif routing is not None and routing.flips and routing.unsteady == report.images:
        what += "; the gate is undecided on every image, so rounding decides: train longer"
    return f"the exported file {what}; nothing was written (--allow-drift records the error and continues)"
