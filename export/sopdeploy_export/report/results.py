"""The results of an export, and the files of the bundle that hold them."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

import sopdeploy
from sopdeploy.bundle.manifest import BatchRange, FileRecord, Lineage, Manifest, TensorRecord, to_json
from sopdeploy.bundle.probes import Probes
from sopdeploy.checkpoint import Checkpoint
from sopdeploy_export.graph.onnx_export import INPUT
from sopdeploy_export.parity.reference import Reference
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.precision.report import PrecisionReport
from sopdeploy_export.proof.certificate import Certificate
from sopdeploy_export.report.network_summary import NetworkSummary
from sopdeploy_export.report.speed import Speed
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
