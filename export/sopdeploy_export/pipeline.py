"""The export, read from top to bottom: checkpoint, detach, certificate, capture, ONNX, parity, bundle."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

import sopdeploy
from sopdeploy import bundle
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.errors import DetachError
from sopdeploy.frozen import Frozen
from sopdeploy.manifest import BatchRange, Lineage, Manifest, TensorRecord, to_json
from sopdeploy.models.base import Classifier
from sopdeploy.probes import Probes, write_probes
from sopdeploy_export import model_card
from sopdeploy_export.capture import Deployed
from sopdeploy_export.certificate import Certificate, Proof, certify, with_onnx_root
from sopdeploy_export.detach import detach
from sopdeploy_export.lower_onnx import INPUT, LOGITS, OPSET, lower, operator_counts, write
from sopdeploy_export.onnx_root import file_root, onnx_root
from sopdeploy_export.parity import ParityReport, Reference, compare, reference
from sopdeploy_export.probe_images import probe_images

Step = Callable[[str], None]


class ExportOptions(Frozen):
    """What a user may ask of an export."""

    detach: bool = False
    batch: BatchRange = BatchRange()
    probes: Path | None = None
    allow_drift: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The bundle that was written, and what was proved and measured on the way."""

    path: Path
    manifest: Manifest
    certificate: Certificate
    parity: ParityReport

    def summary(self) -> dict[str, Any]:
        """Return what `sopdeploy export --json` prints."""
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
        }


def export(
    checkpoint_path: Path,
    destination: Path,
    options: ExportOptions | None = None,
    step: Step = lambda _: None,
) -> Exported:
    """Write a bundle of the checkpoint at *checkpoint_path* into the folder *destination*.

    *step* is told the name of each step as it begins. Raises a `SopdeployError` where any step fails;
    then nothing is left in *destination*.
    """
    options = options or ExportOptions()
    step("reading the checkpoint")
    checkpoint = read_checkpoint(checkpoint_path)
    trained = build_classifier(checkpoint, checkpoint_path)
    images = probe_images(checkpoint.preprocess, options.probes)

    step("detaching" if options.detach else "nothing to detach")
    lean = detach(trained) if options.detach else refuse_training_parts(trained)

    step("proving that what is left is the plain network")
    proof = certify(
        trained,
        lean,
        checkpoint.preprocess,
        torch.from_numpy(images),
        model=checkpoint.model,
        batch=options.batch,
    )

    step("lowering to ONNX")
    model, certificate = lower_with_proof(proof)

    with bundle.staging(destination) as folder:
        write(model, folder / "model.onnx")

        step("comparing the file with the network")
        expected = reference(Deployed(lean, checkpoint.preprocess).eval(), images)
        parity = compare(
            folder / "model.onnx",
            expected,
            images,
            options.batch,
            operator_counts(model),
            allow_drift=options.allow_drift,
        )

        step("writing the bundle")
        write_reports(folder, checkpoint, certificate, parity)
        write_probes(folder / "probes.npz", as_probes(images, expected, parity))
        lineage = Lineage(
            checkpoint_sha256=bundle.digest(checkpoint_path),
            program_root=certificate.roots.any_batch,
            onnx_root=file_root(folder / "model.onnx"),
        )
        card = manifest_fields(checkpoint, certificate, options.batch, lineage)
        (folder / "README.md").write_text(model_card.render(checkpoint, certificate, parity, card))
        manifest = bundle.seal(folder, card)
        path = bundle.publish(folder, manifest, destination)
    return Exported(path=path, manifest=manifest, certificate=certificate, parity=parity)


def refuse_training_parts(trained: Classifier) -> Classifier:
    """Return *trained*, which must have no part that only training needs."""
    if trained.training_only:
        raise DetachError(
            f"{type(trained).__name__} still carries parts that only training needs "
            f"({', '.join(trained.training_only)}); add --detach to take them off with proof"
        )
    return trained


def lower_with_proof(proof: Proof) -> tuple[onnx.ModelProto, Certificate]:
    """Return the lowered lean graph, and the certificate with the root that all lowered graphs share."""
    lean = lower(proof.lean.any_batch)
    roots = {
        "detached": onnx_root(lean),
        "trained": onnx_root(lower(proof.trained.any_batch)),
        "plain": onnx_root(lower(proof.plain.any_batch)),
    }
    return lean, with_onnx_root(proof.certificate, roots)


def write_reports(
    folder: Path, checkpoint: Checkpoint, certificate: Certificate, parity: ParityReport
) -> None:
    """Write labels, certificate and parity report into *folder*."""
    (folder / "labels.json").write_bytes(to_json(list(checkpoint.labels)))
    (folder / "certificate.json").write_bytes(to_json(certificate.model_dump(mode="json")))
    (folder / "parity.json").write_bytes(to_json(parity.model_dump(mode="json")))


def as_probes(images: NDArray[np.uint8], expected: Reference, parity: ParityReport) -> Probes:
    """Return the probes of the bundle; an allowed drift widens the bound that replays must keep."""
    tolerance = parity.tolerance
    if parity.drift_allowed:
        tolerance = max(tolerance, 2 * parity.largest_drift, 2 * parity.alone_or_in_batch)
    return Probes(
        images=images,
        expected={LOGITS: expected.logits.astype(np.float32)},
        tolerance={LOGITS: tolerance},
    )


def manifest_fields(
    checkpoint: Checkpoint, certificate: Certificate, batch: BatchRange, lineage: Lineage
) -> dict[str, Any]:
    """Return every field of the manifest but `files`."""
    side = checkpoint.preprocess.crop
    return {
        "model": checkpoint.model,
        "config": json.loads(json.dumps(checkpoint.config)),
        "inputs": (TensorRecord(name=INPUT, dtype="uint8", shape=(None, side, side, 3)),),
        "outputs": (TensorRecord(name=LOGITS, dtype="float32", shape=(None, len(checkpoint.labels))),),
        "preprocess": checkpoint.preprocess,
        "batch": batch,
        "opset": OPSET,
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
