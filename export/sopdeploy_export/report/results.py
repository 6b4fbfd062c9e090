"""The results of an export, and the files of the bundle that hold them."""

import json
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime as ort
import torch
from numpy.typing import NDArray

import sopdeploy
from sopdeploy.bundle.manifest import BatchRange, FileRecord, Lineage, Manifest, TensorRecord, to_json
from sopdeploy.bundle.probes import Probes
from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.environment import machine
from sopdeploy_export.graph import INPUT
from sopdeploy_export.parity.compare import Reference
from sopdeploy_export.parity.onnx_file import open_session
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.precision.convert import PrecisionReport
from sopdeploy_export.proof.certificate import Certificate
from sopdeploy_export.report.network_summary import NetworkSummary
from sopdeploy_export.rewrites.context import LoweringReport


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResults:
    """The results shown in `report.html`; `fields` are those of the manifest, `files` the other files."""

    checkpoint: Checkpoint
    network_summary: NetworkSummary
    certificate: Certificate
    lowering: LoweringReport
    parity: ParityReport
    precision: PrecisionReport
    speed: Speed | None
    fields: Mapping[str, Any]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The bundle that an export wrote, and its results."""

    path: Path
    manifest: Manifest
    certificate: Certificate
    parity: ParityReport
    precision: PrecisionReport
    lowering: LoweringReport
    network_summary: NetworkSummary
    speed: Speed | None

    def summary(self) -> dict[str, Any]:
        """Build the output of `sopdeploy export --json`."""
        return {
            "bundle": str(self.path),
            "id": self.manifest.id,
            "model": self.manifest.model,
            "detached": list(self.certificate.detached),
            "tensors_removed": len(self.certificate.removed),
            "bytes_removed": self.certificate.bytes_removed,
            "tensors_kept": len(self.certificate.kept),
            "roots": self.certificate.roots.model_dump(),
            "parity": self.parity.model_dump(),
            "precision": self.precision.model_dump(),
            "lowering": self.lowering.model_dump(),
            "trained": self.network_summary.trained.model_dump(),
            "shipped": self.network_summary.shipped.model_dump(),
            "speed": None if self.speed is None else self.speed.model_dump(),
        }


def write_reports(
    folder: Path,
    checkpoint: Checkpoint,
    certificate: Certificate,
    parity: ParityReport,
    precision: PrecisionReport,
) -> None:
    """Write labels, certificate, parity and precision into *folder* as JSON."""
    (folder / "labels.json").write_bytes(to_json(list(checkpoint.labels)))
    (folder / "certificate.json").write_bytes(to_json(certificate.model_dump(mode="json")))
    (folder / "parity.json").write_bytes(to_json(parity.model_dump(mode="json")))
    (folder / "precision.json").write_bytes(to_json(precision.model_dump(mode="json")))


def as_probes(images: NDArray[np.uint8], expected: Reference, parity: ParityReport) -> Probes:
    """Create the bundle's probes from the *images* (P, H, W, 3) that were compared.

    An allowed drift widens the tolerance of replays to twice the observed drift.
    """
    tolerance = {name: output.tolerance for name, output in parity.outputs.items()}
    if parity.drift_allowed:
        for name, output in parity.outputs.items():
            observed = max(output.largest_drift, output.alone_or_in_batch)
            tolerance[name] = max(output.tolerance, 2 * observed)
    kept = parity.compared_images
    return Probes(
        images=images[kept],
        expected={name: values[kept].astype(np.float32) for name, values in expected.outputs.items()},
        tolerance=tolerance,
    )


def manifest_fields(
    checkpoint: Checkpoint,
    certificate: Certificate,
    batch: BatchRange,
    lineage: Lineage,
    expected: Reference,
) -> dict[str, Any]:
    """Collect the fields of the manifest, without `files` and the precision."""
    side = checkpoint.preprocess.crop
    return {
        "model": checkpoint.model,
        "config": json.loads(json.dumps(checkpoint.config)),
        "inputs": (TensorRecord(name=INPUT, dtype="uint8", shape=(None, side, side, 3)),),
        "outputs": tuple(
            TensorRecord(name=name, dtype="float32", shape=(None, *values.shape[1:]))
            for name, values in expected.outputs.items()
        ),
        "preprocess": checkpoint.preprocess,
        "batch": batch,
        "detached": certificate.detached,
        "lineage": lineage,
        "versions": {
            "sopdeploy": sopdeploy.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


WARMUPS, MIN_RUNS, MAX_RUNS = 2, 5, 200
BUDGET_SECONDS = 1.0  # of timed runs per batch size
LARGEST_BATCH = 32


class SpeedRow(StrictModel):
    """Median milliseconds of `runs` runs with `batch` images, of the exported file and the plain graph."""

    batch: int
    runs: int
    ours_ms: float
    plain_ms: float

    @property
    def ratio(self) -> float:
        """The exported file's time divided by the plain graph's."""
        return self.ours_ms / self.plain_ms


class Speed(StrictModel):
    """The timings on one machine, by batch size."""

    runtime: str
    machine: dict[str, str | int | float]
    rows: tuple[SpeedRow, ...]


def measure_speed(path: Path, plain: onnx.ModelProto, images: NDArray[np.uint8], batch: BatchRange) -> Speed:
    """Time the file at *path* and the *plain* graph on *images* (P, H, W, 3), for batches of 1, 2, 4, ..."""
    sessions = (open_session(path), open_session(plain))
    name = sessions[0].get_inputs()[0].name, sessions[1].get_inputs()[0].name
    rows = []
    for power in range(min(batch.maximum, LARGEST_BATCH).bit_length()):
        size = 2**power
        pixels = images[np.arange(size) % len(images)]
        seconds: tuple[list[float], list[float]] = ([], [])
        sides = [(session, {name[i]: pixels}, seconds[i]) for i, session in enumerate(sessions)]
        for _ in range(WARMUPS):
            for session, feed, _taken in sides:
                session.run(None, feed)
        while len(seconds[0]) < MAX_RUNS and (
            len(seconds[0]) < MIN_RUNS or sum(map(sum, seconds)) < BUDGET_SECONDS
        ):
            sides.reverse()  # the second graph runs with the caches of the first
            for session, feed, taken in sides:
                start = time.perf_counter()
                session.run(None, feed)
                taken.append(time.perf_counter() - start)
        ours, other = (statistics.median(taken) * 1e3 for taken in seconds)
        rows.append(SpeedRow(batch=size, runs=len(seconds[0]), ours_ms=ours, plain_ms=other))
    return Speed(runtime=f"onnxruntime {ort.__version__}", machine=machine(), rows=tuple(rows))
