"""The comparison: the file that ships, reloaded from disk, against the network it came from.

It must stay within a measured tolerance (`report`) at every batch size tried, alone or in company; a class
that flips although the network was sure is an error by itself, and so is an image that goes to other
components although the gate was. Where it fails, the caller's *locate* names the first part that is off.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ParityError
from sopdeploy_export.parity.reference import UNDECIDED, Arrays, Reference
from sopdeploy_export.parity.report import (
    GATES,
    LOGITS,
    PROVIDER,
    OutputParity,
    ParityReport,
    SpectralRecord,
    agreement,
)
from sopdeploy_export.parity.routing import counted, rerouted, routing_parity
from sopdeploy_export.parity.session import emulation, file_outputs, open_session
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
    """Return how the ONNX file at *path* compares with the network it came from.

    Raises `ParityError` where an output drifts by more than its tolerance or is not finite, or a class or
    a route flips that the network was sure of; with *allow_drift* the report says so instead.
    """
    session = open_session(path)
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, max(1, batch.maximum - 1)})
    found = {size: file_outputs(session, images, size) for size in sizes}
    other = other_routes(found, expected)
    kept = ~other if expected.routing is None else counted(other, expected.routing)
    outputs = {name: measure(name, found, expected, kept) for name in expected.outputs}
    if not kept.any():
        raise ParityError(f"the exported file sends every image to other components; {UNDECIDED}")
    top1 = agreement(found[1][LOGITS], expected.outputs[LOGITS], outputs[LOGITS].tolerance, ~kept)
    routes = None if expected.routing is None else routing_parity(other, expected.routing)
    passed = all(output.within_tolerance for output in outputs.values()) and top1.flips == 0
    passed = passed and (routes is None or routes.wrong == 0)
    reduced = expected.precision != "fp32"
    report = ParityReport(
        precision=expected.precision,
        runtime=f"onnxruntime {ort.__version__}",
        provider=PROVIDER,
        emulation=emulation(path),
        images=len(images),
        floors_allowed=expected.floors,
        outputs=outputs,
        spread=spread(expected.outputs[LOGITS][kept]) if reduced else None,
        top1=top1,
        routing=routes,
        first_over_floor=None if passed else locate(path),
        operators=operators,
        file_bytes=path.stat().st_size,
        passed=passed,
        drift_allowed=allow_drift and not passed,
    )
    if report.vacuous:
        report = report.model_copy(update={"passed": False, "drift_allowed": allow_drift})
    if not report.passed and not allow_drift:
        raise ParityError(complaint(report))
    return report


def spread(logits: NDArray[Any]) -> float:
    """Return the largest range of a class over images, for *logits* (P, C); over classes where P is 1.

    A file that gives one row of numbers for every picture is off by at least half of it.
    """
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def add_spectral_records(
    report: ParityReport, records: tuple[SpectralRecord, ...], *, allow_drift: bool
) -> ParityReport:
    """Return *report* with the second-order parts' *records*.

    Raises `ParityError` where one of them breaks an invariant; with *allow_drift* the report says so instead.
    """
    broken = violation(records)
    passed = report.passed and broken is None
    whole = report.model_copy(
        update={
            "spectral": records,
            "broken": broken,
            "passed": passed,
            "drift_allowed": allow_drift and not passed,
        }
    )
    if broken is not None and not allow_drift:
        raise ParityError(complaint(whole))
    return whole


def other_routes(found: dict[int, Arrays], expected: Reference) -> NDArray[np.bool_]:
    """Say of each image whether the file sent it to other components, at any batch size."""
    other = np.zeros(len(expected.outputs[LOGITS]), dtype=bool)
    if expected.routing is not None:
        for outputs in found.values():
            other |= rerouted(outputs[GATES], expected.routing)
    return other


def measure(
    name: str, found: dict[int, Arrays], expected: Reference, kept: NDArray[np.bool_]
) -> OutputParity:
    """Return how output *name*, computed at several batch sizes, compares on *kept* images."""
    exact, floor = expected.outputs[name], expected.noise_floor[name]
    return OutputParity(
        noise_floor=floor,
        tolerance=expected.floors * floor,
        drift={str(size): distance(name, outputs[name], exact, kept) for size, outputs in found.items()},
        alone_or_in_batch=max(
            distance(name, outputs[name], found[1][name], kept) for outputs in found.values()
        ),
    )


def distance(name: str, values: NDArray[Any], expected: NDArray[Any], kept: NDArray[np.bool_]) -> float:
    """Return the largest absolute difference; raises where *values* are not finite or of another shape."""
    if values.shape != expected.shape:
        raise ParityError(f"the exported file gives {name} of shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError(f"the exported file gives {name} that are not finite")
    return float(np.abs(values.astype(np.float64) - expected)[kept].max(initial=0.0))


def complaint(report: ParityReport) -> str:
    """Return in one line why *report* did not pass."""
    what = f"flips the top class of {report.top1.flips} of {report.images} images"
    for name, output in report.outputs.items():
        if output.largest_drift > output.tolerance:
            what = (
                f"drifts by {output.largest_drift:.3g} in {name}, {output.drift_in_floors:.1f} noise floors; "
                f"{report.floors_allowed:.0f} ({output.tolerance:.3g}) are allowed"
            )
        elif output.alone_or_in_batch > output.tolerance:
            what = f"gives an image other {name} in a batch than alone, by {output.alone_or_in_batch:.3g}"
    if report.routing is not None and report.routing.wrong:
        what = (
            f"sends {report.routing.wrong} of {report.images} images to other components than the gate chose"
        )
    if report.vacuous:
        floor = report.logits.noise_floor
        what = (
            f"cannot be judged in {report.precision}: its noise floor of {floor:.3g} is "
            f"{floor / max(report.spread or 0.0, floor * 1e-6):.0%} of the spread of the logits, and from "
            f"{0.5 / report.floors_allowed:.1%} on a file that ignores the picture would pass; train it "
            "longer, or choose --precision fp32"
        )
    if report.broken is not None:
        what = f"breaks what must hold of second-order parts: {report.broken}"
    if report.first_over_floor is not None:
        what += f"; {report.first_over_floor}"
    elif report.routing is not None and report.routing.flips and report.routing.unsteady == report.images:
        what += "; its gate is undecided on every image, so that rounding chooses: train it longer"
    return f"the exported file {what}; nothing was written (--allow-drift records it and goes on)"
