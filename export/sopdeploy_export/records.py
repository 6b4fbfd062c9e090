"""What a bundle says of itself: reports, probes and the fields of its manifest."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

import sopdeploy
from sopdeploy.checkpoint import Checkpoint
from sopdeploy.manifest import BatchRange, Lineage, TensorRecord, to_json
from sopdeploy.probes import Probes
from sopdeploy_export.certificate import Certificate
from sopdeploy_export.lower_onnx import INPUT
from sopdeploy_export.parity import ParityReport, Reference
from sopdeploy_export.precision_report import PrecisionReport


def write_reports(
    folder: Path,
    checkpoint: Checkpoint,
    certificate: Certificate,
    parity: ParityReport,
    precision: PrecisionReport,
) -> None:
    """Write labels, certificate and what was measured into *folder*."""
    (folder / "labels.json").write_bytes(to_json(list(checkpoint.labels)))
    (folder / "certificate.json").write_bytes(to_json(certificate.model_dump(mode="json")))
    (folder / "parity.json").write_bytes(to_json(parity.model_dump(mode="json")))
    (folder / "precision.json").write_bytes(to_json(precision.model_dump(mode="json")))


def as_probes(images: NDArray[np.uint8], expected: Reference, parity: ParityReport) -> Probes:
    """Return the probes of the bundle: the images whose numbers were compared.

    An allowed drift widens the bound that replays must keep.
    """
    tolerance = {name: output.tolerance for name, output in parity.outputs.items()}
    if parity.drift_allowed:
        for name, output in parity.outputs.items():
            observed = max(output.largest_drift, output.alone_or_in_batch)
            tolerance[name] = max(output.tolerance, 2 * observed)
    kept = parity.counted
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
    """Return every field of the manifest but `files` and those of the precision."""
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
