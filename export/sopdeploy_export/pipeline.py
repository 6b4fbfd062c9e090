"""The export, read from top to bottom: checkpoint, detach, certificate, capture, ONNX, parity, bundle."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from sopdeploy.bundle import folder as bundle
from sopdeploy.bundle.manifest import BatchRange, Lineage, to_json
from sopdeploy.bundle.probes import write_probes
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.files import sha256
from sopdeploy.models.base import Classifier
from sopdeploy_export.detach import detach
from sopdeploy_export.graph.onnx_export import lower, operator_counts, write
from sopdeploy_export.graph.probe_images import probe_images
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity import torch_program
from sopdeploy_export.parity.compare import add_spectral_records, compare
from sopdeploy_export.parity.reference import Reference, compute_reference
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.parity.spectral import spectral_records
from sopdeploy_export.precision.accuracy_gate import measured
from sopdeploy_export.precision.convert import (
    ConvertedGraph,
    PrecisionOptions,
    convert_precision,
    lowering_options,
)
from sopdeploy_export.proof.certificate import Certificate, Proof, certify, with_onnx_root
from sopdeploy_export.proof.onnx_hash import file_root, onnx_root
from sopdeploy_export.proof.preconditions import refuse_training_parts, refuse_what_cannot_ship
from sopdeploy_export.report.model_card import render_model_card
from sopdeploy_export.report.network_summary import network_summary
from sopdeploy_export.report.page import render_report
from sopdeploy_export.report.results import Exported, ExportResults, as_probes, manifest_fields, write_reports
from sopdeploy_export.report.speed import measure_speed
from sopdeploy_export.rewrites.apply import CertifiedGraph, LoweredGraph, lower_by_rules

__all__ = ["ExportOptions", "Exported", "export"]

Step = Callable[[str], None]


class ExportOptions(StrictModel):
    """What a user may ask of an export."""

    detach: bool = False
    batch: BatchRange = BatchRange()
    probes: Path | None = None
    allow_drift: bool = False
    precision: PrecisionOptions = PrecisionOptions()
    lowering: bool = True
    autotune: bool = False
    measure_speed: bool = False
    pt2: bool = False


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
    refuse_what_cannot_ship(trained)
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
    model, certificate = lower_with_proof(proof, trained.outputs)
    program = proof.lean.any_batch
    del trained, proof  # three networks and six graphs of them, proved: a large one needs the memory
    lowered = lowered_for(CertifiedGraph(lean, program, model), images, checkpoint, options)
    shipping = in_precision(lean, lowered, checkpoint, options, step)

    with bundle.staging(destination) as folder:
        write(shipping.model, folder / "model.onnx")

        step("comparing the file with the network")
        expected, parity = compare_with_network(
            folder / "model.onnx", lean, shipping, checkpoint, images, options
        )
        precision = measured(
            shipping,
            folder / "model.onnx",
            checkpoint.labels,
            checkpoint.preprocess,
            options.batch,
            options.precision,
            allow_drift=options.allow_drift,
        )

        speed = None
        if options.measure_speed:
            step("timing it against the plain backbone")
            speed = measure_speed(folder / "model.onnx", model, images, options.batch)

        if options.pt2:
            step("writing and proving network.pt2")
            content = torch_program.serialize_program(program, certificate)
            torch_program.check_outputs(content, expected, parity, images, options.batch.maximum)
            (folder / torch_program.FILE).write_bytes(content)

        step("writing the bundle")
        write_reports(folder, checkpoint, certificate, parity, precision)
        (folder / "lowering.json").write_bytes(to_json(shipping.rules.model_dump(mode="json")))
        write_probes(folder / "probes.npz", as_probes(images, expected, parity))
        lineage = Lineage(
            checkpoint_sha256=sha256(checkpoint_path),
            program_root=certificate.roots.any_batch,
            onnx_root=file_root(folder / "model.onnx"),
        )
        card = manifest_fields(checkpoint, certificate, options.batch, lineage, expected) | {
            "precision": options.precision.precision,
            "int8_for": options.precision.int8_for if options.precision.precision == "int8" else None,
            "opset": shipping.opset,
        }
        (folder / "README.md").write_text(
            render_model_card(checkpoint, certificate, parity, precision, card), encoding="utf-8"
        )
        findings = ExportResults(
            checkpoint=checkpoint,
            network_summary=network_summary(checkpoint),
            certificate=certificate,
            lowering=shipping.rules,
            parity=parity,
            precision=precision,
            speed=speed,
            fields=card,
            files=bundle.file_records(folder),
        )
        (folder / "report.html").write_text(render_report(findings), encoding="utf-8")
        manifest = bundle.seal(folder, card)
        path = bundle.publish(folder, manifest, destination)
    return Exported(
        path=path,
        manifest=manifest,
        certificate=certificate,
        parity=parity,
        lowering=shipping.rules,
        precision=precision,
        network_summary=findings.network_summary,
        speed=speed,
    )


def lowered_for(
    certified: CertifiedGraph, images: NDArray[np.uint8], checkpoint: Checkpoint, options: ExportOptions
) -> LoweredGraph:
    """Return the network and its graph by the rules, with the forms that suit the precision asked for."""
    wish = lowering_options(options.precision, rules=options.lowering, autotune=options.autotune)
    return lower_by_rules(certified, images, checkpoint.preprocess, options.batch, wish)


def in_precision(
    lean: Classifier,
    lowered: LoweredGraph,
    checkpoint: Checkpoint,
    options: ExportOptions,
    step: Step,
) -> ConvertedGraph:
    """Return the graph that ships: the *lowered* one, or what the precision asked for makes of it."""
    if options.precision.precision != "fp32":
        step(f"placing {options.precision.precision} in the graph")
    return convert_precision(lean, lowered, checkpoint.preprocess, options.batch, options.precision)


def compare_with_network(
    path: Path,
    lean: Classifier,
    shipping: ConvertedGraph,
    checkpoint: Checkpoint,
    images: NDArray[np.uint8],
    options: ExportOptions,
) -> tuple[Reference, ParityReport]:
    """Return what *lean* gives for *images* in float64, and how the file at *path* compares with it."""
    deployed = Deployed(lean, checkpoint.preprocess).eval()
    expected = compute_reference(
        deployed, images, shipping.own, options.precision.precision, shipping.own_gate
    )

    parity = compare(
        path,
        expected,
        images,
        options.batch,
        operator_counts(shipping.model),
        allow_drift=options.allow_drift,
        locate=lambda file: shipping.locate(file, images, expected.floors),
    )
    records = spectral_records(shipping.spectral, torch.from_numpy(images))
    parts = shipping.drifts(path, images[parity.compared_images])
    parity = add_spectral_records(parity, records, allow_drift=options.allow_drift)
    return expected, parity.model_copy(update={"parts": parts})


def lower_with_proof(proof: Proof, outputs: tuple[str, ...]) -> tuple[onnx.ModelProto, Certificate]:
    """Return the lowered lean graph, and the certificate with the root that all lowered graphs share."""
    lean = lower(proof.lean.any_batch, outputs)
    trained = lean if proof.trained is proof.lean else lower(proof.trained.any_batch, outputs)
    root = onnx_root(lean)
    roots = {
        "detached": root,
        "trained": root if trained is lean else onnx_root(trained),
        "plain": onnx_root(lower(proof.plain.any_batch, outputs)),
    }
    return lean, with_onnx_root(proof.certificate, roots)
