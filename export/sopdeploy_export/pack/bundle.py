"""What a bundle holds besides the file: probes, golden examples, reports, model card and manifest."""

import json
import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import torch
from numpy.typing import NDArray
from torch import nn

from sopdeploy.base.project import utc_now
from sopdeploy.bundle import publication
from sopdeploy.bundle.golden import TOLERANCES, write_golden
from sopdeploy.bundle.manifest import LOGITS, Lineage, Manifest, TensorRecord, to_json
from sopdeploy.bundle.probes import Probes
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.version import __version__
from sopdeploy_export.capture.deployed import INPUT
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.model_card import render_model_card
from sopdeploy_export.pack.results import ExportResults
from sopdeploy_export.prove.file import ParityReport
from sopdeploy_export.prove.reference import ParityReference, compared_images
from sopdeploy_export.runs import GateRun, file_outputs, find_gate, mark_decided
from sopdeploy_export.subject import ExportSubject


def as_probes(
    images: NDArray[np.uint8], expected: ParityReference, parity: ParityReport
) -> Probes:
    """Create the bundle's probes from those of *images* (P, H, W, 3) whose outputs *parity* compared.

    `parity.routing` names the other images. If drift beyond the tolerance was allowed, the
    tolerance of each output is at least twice the largest measured difference, from float64 or
    between batch sizes.
    """
    is_compared_P = compared_images(parity.routing, len(images))

    # The tolerance of each output, wider for drift that was allowed.
    tolerances = {}
    for name, output in parity.outputs.items():
        tolerances[name] = output.tolerance
        if parity.drift_allowed:
            difference = max(output.largest_drift, output.batch_difference)
            tolerances[name] = max(output.tolerance, 2 * difference)

    return Probes(
        images=images[is_compared_P],
        expected={
            name: values[is_compared_P].astype(np.float32)
            for name, values in expected.outputs.items()
        },
        tolerance=tolerances,
    )


def write_golden_examples(
    folder: Path,
    session: onnxruntime.InferenceSession,
    preprocess: Preprocess,
    network: nn.Module,
    gate: GateRun | None,
    parity: ParityReport,
    tolerance: float,
) -> None:
    """Write golden examples of *session*, whose images *preprocess* converts, to *folder*.

    Images for which rounding can change the choice of the gate of *network* are left out; *gate* computes
    its logits. *tolerance* is allowed for the logits of the probes, and `TOLERANCES` times
    as much for the logits of the examples.
    """

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = file_outputs(session, pixels[None], 1)[LOGITS][0]
        return logits

    def has_decided_gate(pixels: NDArray[np.uint8]) -> bool:
        """Return whether rounding cannot change the choice; True without a gate."""
        if gate is None or parity.routing is None:
            return True
        logits = gate(torch.tensor(pixels[None]))
        num_chosen = find_gate(network).chosen
        return bool(mark_decided(logits, num_chosen, parity.routing.tolerance).all())

    write_golden(folder, preprocess, run, TOLERANCES * tolerance, has_decided_gate)


def write_reports(
    subject: ExportSubject,
    folder: Path,
    options: ExportOptions,
    probes: Probes,
    results: ExportResults,
    opset: int,
) -> Manifest:
    """Write the reports, class names, model card and manifest to *folder*; return the manifest.

    *folder* has the other files already.
    """
    # The reports and the class names.
    for name in ("parity", "precision"):
        report = getattr(results, name).model_dump(mode="json")
        (folder / f"{name}.json").write_bytes(to_json(report))
    (folder / "labels.json").write_bytes(to_json(list(subject.labels)))

    # The fields of the manifest.
    certificate = results.certificate
    side = subject.preprocess.crop
    precision = options.precision
    versions = {
        "sopdeploy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "pillow": PIL.__version__,
    }
    fields = {
        "model": subject.name,
        "project": subject.project,
        "exported_at": utc_now(),
        "origin": subject.origin,
        "config": json.loads(json.dumps(subject.config)),  # with lists for tuples
        "inputs": (TensorRecord(name=INPUT, dtype="uint8", shape=(None, side, side, 3)),),
        "outputs": tuple(
            TensorRecord(name=name, dtype="float32", shape=(None, *values.shape[1:]))
            for name, values in probes.expected.items()
        ),
        "preprocess": subject.preprocess,
        "decision": subject.decision,
        "temperature_scaling": certificate.temperature_scaling,
        "pixels": certificate.pixels,
        "batch": options.batch,
        "mixes_images": certificate.mixes_images,
        "detached": certificate.detached,
        "lineage": Lineage(
            checkpoint_sha256=subject.sha256,
            program_root=certificate.roots.any_batch,
            onnx_root=certificate.roots.shipped,
        ),
        "versions": {**versions, **subject.plugins()},
        "precision": precision,
        "int8_for": options.int8_for if precision == "int8" else None,
        "opset": opset,
    }

    # The model card, which shows some of these fields; then the manifest, with hashes of all files.
    (folder / "README.md").write_text(
        render_model_card(subject, results, fields), encoding="utf-8"
    )
    return publication.seal(folder, fields, certificate.model_dump(mode="json"))
