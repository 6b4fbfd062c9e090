"""Parity: the file that ships, reloaded from disk, must give the network's numbers.

The yardstick is measured, not guessed: the network runs in float64, and the distance of its own float32 run
from that is the noise floor. The file may drift by a small multiple of the floor, at every batch size tried,
alone or in company; a class that flips although the network was sure is an error by itself.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from sopdeploy.errors import ParityError
from sopdeploy.frozen import Frozen
from sopdeploy.manifest import BatchRange
from sopdeploy_export.capture import Deployed

FLOORS = 16.0  # how many noise floors the file may drift: folding batch norm and other kernels take 1 to 4
PROVIDER = "CPUExecutionProvider"


class Agreement(Frozen):
    """How often the top class is the network's.

    A flip counts as noise where the network's own margin between the two is below twice the tolerance.
    """

    images: int
    agree: int
    flips_within_noise: int
    flips: int


class ParityReport(Frozen):
    """What was measured on the shipped file; differences are absolute, in units of the logits."""

    runtime: str
    provider: str
    images: int
    noise_floor: float
    tolerance: float
    drift: dict[str, float]
    drift_in_floors: float
    alone_or_in_batch: float
    top1: Agreement
    operators: dict[str, int]
    file_bytes: int
    passed: bool
    drift_allowed: bool

    @property
    def largest_drift(self) -> float:
        """Return the largest drift over all batch sizes."""
        return max(self.drift.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The network's logits (P, classes) in float64, and how far its float32 run is from them."""

    logits: NDArray[np.float64]
    noise_floor: float


def reference(deployed: Deployed, images: NDArray[np.uint8]) -> Reference:
    """Return the float64 logits of *images* (P, H, W, 3) and the noise floor of *deployed*."""
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        exact = copy.deepcopy(deployed).double()(pixels).numpy()
        single = torch.cat([deployed(pixels[i : i + 1]) for i in range(len(pixels))]).numpy()
        together = deployed(pixels).numpy()
    if not np.isfinite(exact).all():
        raise ParityError("the network's own logits are not finite on the probe images; train it again")
    smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(exact).max())
    floors = [float(np.abs(values - exact).max()) for values in (single, together)]
    return Reference(logits=exact, noise_floor=max(*floors, smallest))


def open_session(path: Path) -> ort.InferenceSession:
    """Return the file at *path* in the runtime and with the optimisations it will be served with."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    if session.get_providers()[0] != PROVIDER:
        raise ParityError(f"onnxruntime runs on {session.get_providers()[0]}, not on {PROVIDER}")
    return session


def file_logits(session: ort.InferenceSession, images: NDArray[np.uint8], batch: int) -> NDArray[Any]:
    """Return the file's logits of *images*, each computed in a batch of exactly *batch* images."""
    name = session.get_inputs()[0].name
    starts = range(0, len(images), batch)
    chunks = []
    for start in starts:
        wanted = np.arange(start, start + batch) % len(images)
        chunks.append(session.run(None, {name: images[wanted]})[0])
    return np.concatenate(chunks)[: len(images)]


def compare(
    path: Path,
    expected: Reference,
    images: NDArray[np.uint8],
    batch: BatchRange,
    operators: dict[str, int],
    *,
    allow_drift: bool = False,
) -> ParityReport:
    """Return how the ONNX file at *path* compares with the network it came from.

    Raises `ParityError` where it drifts by more than `FLOORS` noise floors, gives numbers that are not
    finite, or flips a class the network was sure of; with *allow_drift* the report says so instead.
    """
    session = open_session(path)
    tolerance = FLOORS * expected.noise_floor
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, max(1, batch.maximum - 1)})
    logits = {size: file_logits(session, images, size) for size in sizes}
    drift = {str(size): distance(values, expected.logits) for size, values in logits.items()}
    company = max(distance(values, logits[1]) for values in logits.values())
    top1 = agreement(logits[1], expected.logits, tolerance)
    worst = max(drift.values())
    passed = bool(worst <= tolerance and company <= tolerance and top1.flips == 0)
    report = ParityReport(
        runtime=f"onnxruntime {ort.__version__}",
        provider=PROVIDER,
        images=len(images),
        noise_floor=expected.noise_floor,
        tolerance=tolerance,
        drift=drift,
        drift_in_floors=worst / expected.noise_floor,
        alone_or_in_batch=company,
        top1=top1,
        operators=operators,
        file_bytes=path.stat().st_size,
        passed=passed,
        drift_allowed=allow_drift and not passed,
    )
    if not passed and not allow_drift:
        raise ParityError(complaint(report))
    return report


def distance(values: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest absolute difference; raises where *values* are not finite or of another shape."""
    if values.shape != expected.shape:
        raise ParityError(f"the exported file gives logits of shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError("the exported file gives logits that are not finite")
    return float(np.abs(values.astype(np.float64) - expected).max())


def agreement(values: NDArray[Any], expected: NDArray[np.float64], tolerance: float) -> Agreement:
    """Return how often the top class agrees, flips the network was unsure of counted apart."""
    rows = np.arange(len(expected))
    theirs, ours = expected.argmax(axis=1), values.argmax(axis=1)
    margin = expected[rows, theirs] - expected[rows, ours]
    flipped = theirs != ours
    return Agreement(
        images=len(expected),
        agree=int((~flipped).sum()),
        flips_within_noise=int((flipped & (margin <= 2 * tolerance)).sum()),
        flips=int((flipped & (margin > 2 * tolerance)).sum()),
    )


def complaint(report: ParityReport) -> str:
    """Return in one line why *report* did not pass."""
    if report.largest_drift > report.tolerance:
        what = (
            f"drifts by {report.largest_drift:.3g}, {report.drift_in_floors:.1f} noise floors; "
            f"{FLOORS:.0f} ({report.tolerance:.3g}) are allowed"
        )
    elif report.alone_or_in_batch > report.tolerance:
        what = f"gives an image other logits in a batch than alone, by {report.alone_or_in_batch:.3g}"
    else:
        what = f"flips the top class of {report.top1.flips} of {report.images} images"
    return f"the exported file {what}; nothing was written (--allow-drift records it and goes on)"
