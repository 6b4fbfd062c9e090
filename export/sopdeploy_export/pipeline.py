"""The export pipeline, from a checkpoint or any other `ExportSubject` to a bundle."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram

from sopdeploy.bundle import folder as bundle
from sopdeploy.bundle.folder import read_bundles
from sopdeploy.bundle.manifest import EMBEDDING, Manifest
from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.bundle.probes import write_probes
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.errors import CertificateError, CheckpointError, ConfigError, DetachError
from sopdeploy.models.base import Classifier
from sopdeploy.names import label_problem
from sopdeploy_export.admit.network import check_exportable
from sopdeploy_export.capture.deployed import (
    Deployed,
    generated_images,
    output_names,
    probe_pixels,
)
from sopdeploy_export.capture.program import Captures, capture_any_batch
from sopdeploy_export.detach.detach import detach, has_tensors
from sopdeploy_export.last_layer import add_embedding_output, fold_temperature
from sopdeploy_export.lower.accuracy import AccuracyCheck
from sopdeploy_export.lower.constant_parts import fold_constant_parts
from sopdeploy_export.lower.operators import check_operators
from sopdeploy_export.lower.precision import NO_IMAGES, Lowered, convert_precision
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.bundle import (
    as_probes,
    count_costs,
    write_golden_examples,
    write_reports,
)
from sopdeploy_export.pack.model_card import write_page
from sopdeploy_export.pack.results import Exported, ExportResults
from sopdeploy_export.program_hashes import program_root
from sopdeploy_export.prove.certificate import Certificate, Step, announce, certify
from sopdeploy_export.prove.file import compute_reference, prove_file
from sopdeploy_export.prove.images import prove_images
from sopdeploy_export.runs import LOGITS, ProbeOutputs, open_session
from sopdeploy_export.subject import Detachment, ExportSubject

ONNX_FILE = "model.onnx"
OPERATOR_IMAGES = 2  # of the run that records the operators of a program


def export_checkpoint(
    path: Path,
    destination: Path,
    *,
    options: ExportOptions | None = None,
    on_step: Step = lambda _: None,
) -> Exported:
    """Convert the checkpoint at *path* to a bundle in *destination*, as `sopdeploy.export` does.

    For a network outside of the catalog, call `sopdeploy.export_network`. Calls *on_step* with
    a description of each step as it begins. Raises a `SopdeployError` if a step failed;
    *destination* contains nothing new.
    """
    if options is None:
        options = ExportOptions()
    checkpoint = read_checkpoint(path)
    subject = _as_subject(checkpoint, build_classifier(checkpoint, path), options.name)
    check_exportable(subject.network, subject.detachment.training_only)
    # a name that the user gave may be that of a bundle, in order to replace it
    if options.name is None:
        refuse_other_images(destination, subject.project, checkpoint)
    return export_subject(subject, destination, options, on_step)


def rebuild_program(path: Path, manifest: Manifest) -> ExportedProgram:
    """Capture the certified program of the bundle with *manifest* again, from its checkpoint at *path*.

    Raises `CheckpointError` for another checkpoint, and `CertificateError` if its program has
    another hash here than in the certificate, for example because torch captures it in another
    way.
    """
    checkpoint = read_checkpoint(path)
    lineage = manifest.lineage
    if checkpoint.sha256 != lineage.checkpoint_sha256:
        raise CheckpointError(
            f"{path}: not the checkpoint of {manifest.name}; give the one that was exported"
        )
    subject = _as_subject(checkpoint, build_classifier(checkpoint, path))
    images = generated_images(manifest.preprocess.crop)
    if EMBEDDING in [output.name for output in manifest.outputs]:
        _add_embedding(subject, images)
    network = detach(_with_temperature(subject, images), subject.detachment.training_only)
    program = capture_any_batch(network, subject.preprocess, manifest.batch)
    root = program_root(program).sha256
    if root != lineage.program_root:
        raise CertificateError(
            f"{path}: torch {torch.__version__} captures a program with the hash {root[:16]}, but that "
            f"of the bundle is {lineage.program_root[:16]}; use torch {manifest.versions.get('torch')}"
        )
    return program


def _as_subject(
    checkpoint: Checkpoint, network: Classifier, name: str | None = None
) -> ExportSubject:
    """Describe *network*, which was built from *checkpoint*, as the subject of an export."""
    return ExportSubject(
        name=checkpoint.model,
        project=name or checkpoint.project or checkpoint.model.replace(":", "-"),
        network=network,
        detachment=Detachment.of(network),
        labels=checkpoint.labels,
        preprocess=checkpoint.preprocess,
        config=checkpoint.config,
        sha256=checkpoint.sha256,
        decision=checkpoint.decision,
        training=checkpoint.training,
        origin=checkpoint.origin,
    )


def refuse_other_images(destination: Path, project: str, checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` if *destination* has bundles of *project*, but none with images of *checkpoint*.

    A server would replace one network by the other. The caller omits this check if the user
    named the *project*. Without hashes, a checkpoint or a bundle fits any other.
    """
    images = set(checkpoint.image_hashes.tolist())
    manifests = [
        found.manifest for found in read_bundles(destination) if found.manifest is not None
    ]
    origins = [
        manifest.origin
        for manifest in manifests
        if manifest.project == project and manifest.origin
    ]
    all_have_others = all(
        origin.sample and images.isdisjoint(origin.sample) for origin in origins
    )
    if images and origins and all_have_others:
        raise ConfigError(
            f"{destination}: has a network named {project} that was trained on other images; give another "
            "name or, to replace it on servers, this one",
            remedies={"name": "NAME"},
        )


def export_subject(
    subject: ExportSubject,
    destination: Path,
    options: ExportOptions,
    on_step: Step,
    captures: Captures | None = None,
) -> Exported:
    """Export *subject* as a bundle in *destination*, as `export_checkpoint` does.

    *captures* has the programs of networks that were captured before.
    """
    if problem := label_problem(subject.labels):
        raise ConfigError(f"{problem}; rename the class and train again")
    has_photos = options.calibrate is not None or options.evaluate is not None
    accuracy_check = AccuracyCheck(subject, options) if has_photos else None
    preprocess = subject.preprocess
    started = time.monotonic()
    # first, because it checks that the folder can be written
    with bundle.staging(destination) as folder:
        images = generated_images(preprocess.crop)
        trained, detached = _detach_subject(subject, images, options)
        captures = captures or Captures(preprocess, options.batch)
        images_BHWC = torch.from_numpy(images)
        # The statements about networks
        proof, captured = certify(
            trained,
            detached,
            captures,
            images_BHWC,
            model=subject.name,
            detachment=subject.detachment,
            on_step=on_step,
        )
        on_step("converting to ONNX")
        program = captured["detached"].program
        outputs = output_names(detached)
        folded = fold_constant_parts(program)
        certified = Lowered(detached, program, lower(folded, outputs))
        root = onnx_root(certified.model)
        on_step(announce("Images"))
        mixes_images = prove_images(certified.model, allowed=options.allow_batch_dependence)
        comparing = "comparing operators with their ONNX forms"
        on_step(comparing)
        check_operators(
            folded,
            images[: min(OPERATOR_IMAGES, options.max_batch)],
            lambda done: on_step(f"{comparing}, {done}"),
        )
        if options.precision != "fp32":
            on_step(f"converting the graph to {options.precision}")
        measuring = NO_IMAGES if accuracy_check is None else accuracy_check.images()
        converted = convert_precision(certified, preprocess, options, measuring)
        model = converted.model
        precision = converted.precision
        (folder / ONNX_FILE).write_bytes(model.SerializeToString(deterministic=True))
        shipped_root = root if options.precision == "fp32" else onnx_root(model)
        certificate = Certificate.of(proof, root, shipped_root, mixes_images, options.precision)
        session = open_session(folder / ONNX_FILE)
        if accuracy_check is not None:
            measured = accuracy_check.measure(certified.model, session)
            precision = precision.model_copy(update={"accuracy": measured})
            accuracy_check.check_drop(precision)
        on_step(f"{announce('File')}, the network in float64")
        deployed = Deployed(certified.network, preprocess).eval()
        rounded = ProbeOutputs.of(converted.run, images_BHWC)
        exact = compute_reference(deployed, images, rounded, options.precision, converted.gate)
        on_step(f"{announce('File')}, {ONNX_FILE}")
        parity = prove_file(
            session, model, exact, images, options.batch, allow_drift=options.allow_drift
        )
        trained_costs, shipped_costs = count_costs(
            subject.network, certified.network, preprocess.crop
        )
        results = ExportResults(
            certificate=certificate,
            parity=parity,
            precision=precision,
            trained=trained_costs,
            shipped=shipped_costs,
            decision=subject.decision,
        )
        on_step("writing the bundle")
        probes = as_probes(images, exact, parity)
        write_probes(folder / "probes.npz", probes)
        write_golden_examples(
            subject, folder, session, converted.gate, parity, probes.tolerance[LOGITS]
        )
        manifest = write_reports(
            subject, folder, options, probes, results, model.opset_import[0].version
        )
        path = bundle.publish(folder, manifest, destination)
        seconds = time.monotonic() - started
    # `Exported` has all fields of `ExportResults`, its base class, and these four.
    exported = Exported(
        **vars(results),
        path=path,
        manifest=manifest,
        warnings=subject.warnings,
        seconds=seconds,
    )
    return replace(exported, page=write_page(exported, subject.labels))


def _detach_subject(
    subject: ExportSubject, images: NDArray[np.uint8], options: ExportOptions
) -> tuple[nn.Module, nn.Module]:
    """Return the network of *subject* with its temperature, and a copy without its training-only parts.

    With `with_features`, its embedding becomes an output, in place. Raises `DetachError` if
    there are such parts and the options do not allow to remove them.
    """
    training_only = subject.detachment.training_only
    if not options.detach and has_tensors(subject.network, training_only):
        kind = type(subject.network).__name__
        parts = ", ".join(training_only)
        problem = f"{kind} still carries training-only parts ({parts})"
        raise DetachError(problem, remedies={"detach": True})
    if options.with_features:
        _add_embedding(subject, images)
    trained = _with_temperature(subject, images)
    return trained, detach(trained, training_only, probe_pixels(trained, subject.preprocess))


def _add_embedding(subject: ExportSubject, images: NDArray[np.uint8]) -> None:
    """Make the input of the last linear layer an output of the network of *subject*."""
    classes = len(subject.labels)
    training_only = subject.detachment.training_only
    add_embedding_output(subject.network, subject.preprocess, images, classes, training_only)


def _with_temperature(subject: ExportSubject, images: NDArray[np.uint8]) -> nn.Module:
    """Return the network of *subject*, or a copy with its temperature, if any, folded into the last layer.

    *images* run in it to find this layer.
    """
    decision = subject.decision
    preprocess = subject.preprocess
    classes = len(subject.labels)
    if decision is None or decision.temperature == 1:
        return subject.network
    return fold_temperature(subject.network, decision.temperature, preprocess, images, classes)
