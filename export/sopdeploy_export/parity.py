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
LOGITS = "logits"
ALONE, TOGETHER = 4, 16  # probes the network computes one by one, and the largest batch it computes

Arrays = dict[str, NDArray[Any]]


class Agreement(Frozen):
    """How often the top class is the network's.

    A flip counts as noise where the network's own margin between the two is below twice the tolerance.
    """

    images: int
    agree: int
    flips_within_noise: int
    flips: int


class OutputParity(Frozen):
    """What was measured on one output of the shipped file, in the units of that output.

    `drift` is the largest difference from the network in float64 by batch size, `alone_or_in_batch` the
    largest difference that an image's company makes.
    """

    noise_floor: float
    tolerance: float
    drift: dict[str, float]
    alone_or_in_batch: float

    @property
    def largest_drift(self) -> float:
        """Return the largest drift over all batch sizes."""
        return max(self.drift.values())

    @property
    def drift_in_floors(self) -> float:
        """Return the largest drift in multiples of the noise floor."""
        return self.largest_drift / self.noise_floor

    @property
    def within_tolerance(self) -> bool:
        """Say whether neither drift nor company moves the output by more than its tolerance."""
        return max(self.largest_drift, self.alone_or_in_batch) <= self.tolerance


class ParityReport(Frozen):
    """What was measured on the shipped file."""

    runtime: str
    provider: str
    images: int
    outputs: dict[str, OutputParity]
    top1: Agreement
    operators: dict[str, int]
    file_bytes: int
    passed: bool
    drift_allowed: bool

    @property
    def logits(self) -> OutputParity:
        """Return what was measured on the logits."""
        return self.outputs[LOGITS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The network's outputs in float64, and how far its own float32 run is from each."""

    outputs: Arrays
    noise_floor: dict[str, float]


def reference(deployed: Deployed, images: NDArray[np.uint8]) -> Reference:
    """Return the float64 outputs of *deployed* for *images* (P, H, W, 3), and its noise floor."""
    exact = network_outputs(copy.deepcopy(deployed).double(), images, TOGETHER)
    together = network_outputs(deployed, images, TOGETHER)
    alone = network_outputs(deployed, images[:ALONE], 1)
    floors = {}
    for name, values in exact.items():
        if not np.isfinite(values).all():
            raise ParityError(f"the network's own {name} are not finite on the probe images; train it again")
        smallest = 4 * float(np.finfo(np.float32).eps) * float(np.abs(values).max())
        runs = (np.abs(together[name] - values).max(), np.abs(alone[name] - values[:ALONE]).max())
        floors[name] = max(smallest, *(float(run) for run in runs))
    return Reference(outputs=exact, noise_floor=floors)


def network_outputs(deployed: Deployed, images: NDArray[np.uint8], batch: int) -> Arrays:
    """Return the outputs of *deployed* by name, computed in batches of at most *batch* images."""
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        chunks = [deployed(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    joined = (torch.cat(values).numpy() for values in zip(*chunks, strict=True))
    return dict(zip(deployed.network.outputs, joined, strict=True))


def open_session(path: Path) -> ort.InferenceSession:
    """Return the file at *path* in the runtime and with the optimisations it will be served with."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    if session.get_providers()[0] != PROVIDER:
        raise ParityError(f"onnxruntime runs on {session.get_providers()[0]}, not on {PROVIDER}")
    return session


def file_outputs(session: ort.InferenceSession, images: NDArray[np.uint8], batch: int) -> Arrays:
    """Return the file's outputs for *images*, each computed in a batch of exactly *batch* images."""
    source = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]
    chunks = []
    for start in range(0, len(images), batch):
        wanted = np.arange(start, start + batch) % len(images)
        chunks.append(session.run(names, {source: images[wanted]}))
    joined = (np.concatenate(values)[: len(images)] for values in zip(*chunks, strict=True))
    return dict(zip(names, joined, strict=True))


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

    Raises `ParityError` where an output drifts by more than `FLOORS` noise floors or is not finite, or a
    class flips that the network was sure of; with *allow_drift* the report says so instead.
    """
    session = open_session(path)
    sizes = sorted({1, min(2, batch.maximum), batch.optimum, max(1, batch.maximum - 1)})
    found = {size: file_outputs(session, images, size) for size in sizes}
    outputs = {name: measure(name, found, expected) for name in expected.outputs}
    top1 = agreement(found[1][LOGITS], expected.outputs[LOGITS], outputs[LOGITS].tolerance)
    passed = all(output.within_tolerance for output in outputs.values()) and top1.flips == 0
    report = ParityReport(
        runtime=f"onnxruntime {ort.__version__}",
        provider=PROVIDER,
        images=len(images),
        outputs=outputs,
        top1=top1,
        operators=operators,
        file_bytes=path.stat().st_size,
        passed=passed,
        drift_allowed=allow_drift and not passed,
    )
    if not passed and not allow_drift:
        raise ParityError(complaint(report))
    return report


def measure(name: str, found: dict[int, Arrays], expected: Reference) -> OutputParity:
    """Return how output *name*, computed at several batch sizes, compares with the network's."""
    exact, floor = expected.outputs[name], expected.noise_floor[name]
    return OutputParity(
        noise_floor=floor,
        tolerance=FLOORS * floor,
        drift={str(size): distance(name, outputs[name], exact) for size, outputs in found.items()},
        alone_or_in_batch=max(distance(name, outputs[name], found[1][name]) for outputs in found.values()),
    )


def distance(name: str, values: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest absolute difference; raises where *values* are not finite or of another shape."""
    if values.shape != expected.shape:
        raise ParityError(f"the exported file gives {name} of shape {values.shape}, not {expected.shape}")
    if not np.isfinite(values).all():
        raise ParityError(f"the exported file gives {name} that are not finite")
    return float(np.abs(values.astype(np.float64) - expected).max())


def agreement(values: NDArray[Any], expected: NDArray[Any], tolerance: float) -> Agreement:
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
    what = f"flips the top class of {report.top1.flips} of {report.images} images"
    for name, output in report.outputs.items():
        if output.largest_drift > output.tolerance:
            what = (
                f"drifts by {output.largest_drift:.3g} in {name}, {output.drift_in_floors:.1f} noise floors; "
                f"{FLOORS:.0f} ({output.tolerance:.3g}) are allowed"
            )
        elif output.alone_or_in_batch > output.tolerance:
            what = f"gives an image other {name} in a batch than alone, by {output.alone_or_in_batch:.3g}"
    return f"the exported file {what}; nothing was written (--allow-drift records it and goes on)"
