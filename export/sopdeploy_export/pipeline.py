"""The export pipeline, from a checkpoint or any other `ExportSubject` to a bundle."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from torch import Tensor
from torch.export import ExportedProgram

from sopdeploy.bundle import publication
from sopdeploy.bundle.listing import read_bundles
from sopdeploy.bundle.manifest import EMBEDDING, PROOFS, BatchRange, Manifest, ProofKind
from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.bundle.probes import write_probes
from sopdeploy.bundle.second_order import count_second_order
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    DetachError,
    LoweringError,
)
from sopdeploy.files import GRAPH
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy.models.describe import name_network
from sopdeploy.names import label_problem
from sopdeploy_export.admit.network import check_exportable, check_torch_state
from sopdeploy_export.capture.deployed import generated_images, ordinary_images, output_names
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.last_layer import add_embedding_output, fold_temperature
from sopdeploy_export.lower.accuracy import AccuracyCheck
from sopdeploy_export.lower.compared import find_order
from sopdeploy_export.lower.precision import (
    NO_IMAGES,
    Converted,
    Lowered,
    convert_precision,
)
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.network import attributes_restored
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
from sopdeploy_export.progress import Step, reporting, step
from sopdeploy_export.prove.certificate import Certificate, Checks, Roots, kind_of_proof
from sopdeploy_export.prove.constants import check_constants
from sopdeploy_export.prove.file import (
    ParityReference,
    ParityReport,
    compute_reference,
    prove_file,
)
from sopdeploy_export.prove.graphs import prove_graph
from sopdeploy_export.prove.images import check_mixing, run_with_neighbors
from sopdeploy_export.prove.networks import Compared, build_plain
from sopdeploy_export.prove.plain_run import measure_plain_run
from sopdeploy_export.prove.removed import has_tensors, list_tensors, prove_removed
from sopdeploy_export.runs import LOGITS, open_session, run_probes
from sopdeploy_export.subject import Detachment, ExportSubject


def export_checkpoint(
    path: Path,
    destination: Path,
    *,
    options: ExportOptions | None = None,
    on_step: Step = lambda _: None,
) -> Exported:
    """Convert the checkpoint at *path* to a bundle in *destination*, as `sopdeploy.export` does.

    For a network outside of the catalog, call `sopdeploy.export_network`. Calls *on_step* with
    a description of each step as it begins. Raises a `SopdeployError` if a step failed. Then
    *destination* contains nothing new, or only the bundle, if the page about it cannot be written.
    """
    if options is None:
        options = ExportOptions()
    checkpoint = read_checkpoint(path)
    subject = _as_subject(checkpoint, build_classifier(checkpoint, path), options.name)
    check_torch_state()
    check_exportable(subject.network, subject.detachment.training_only)
    # A server would replace a bundle of the same name, so one that was trained on other images is
    # refused; not if the user gave the name, who may want to replace it.
    if options.name is None:
        refuse_other_images(destination, subject.project, checkpoint)
    _check_subject(subject, options)
    with reporting(on_step):
        return export_subject(subject, destination, options)


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

    # The changes that the export made before it captured the network.
    has_embedding = EMBEDDING in [output.name for output in manifest.outputs]
    _change_last_layer(subject, with_features=has_embedding)

    program = capture_any_batch(subject.network, subject.preprocess, manifest.batch)
    root = program_root(program).sha256
    if root != lineage.program_root:
        raise CertificateError(
            f"{path}: torch {torch.__version__} captures a program with the graph hash "
            f"{root[:16]}, but the bundle has {lineage.program_root[:16]}; "
            f"use torch {manifest.versions.get('torch')}"
        )
    return program


def _change_last_layer(subject: ExportSubject, *, with_features: bool) -> None:
    """Fold the temperature of the decision of *subject* into the last linear layer of its network, in place.

    A temperature of 1 changes nothing. With *with_features*, the input of this layer becomes an
    output. Raises `LoweringError` if one of the two is to be done and no linear layer computes the
    logits.
    """
    network = subject.network
    preprocess = subject.preprocess
    images = generated_images(preprocess.crop)
    classes = len(subject.labels)
    decision = subject.decision
    if with_features:
        training_only = subject.detachment.training_only
        add_embedding_output(network, preprocess, images, classes, training_only)
    if decision is not None and decision.temperature != 1:
        fold_temperature(network, decision.temperature, preprocess, images, classes)


def _as_subject(
    checkpoint: Checkpoint, network: Classifier, name: str | None = None
) -> ExportSubject:
    """Make the subject of an export of *network*, which was built from *checkpoint*.

    *name* is that of the project, by default that in the checkpoint, or else that of the network.
    """
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
    named the *project*. Bundles without an origin are ignored. A checkpoint without hashes of its
    images is not refused, and none is if a bundle has no hashes: its images can be the same ones.
    """
    # The origins of the bundles of the project, with hashes of a sample of their images.
    images = set(checkpoint.image_hashes.tolist())
    manifests = [
        listed.manifest for listed in read_bundles(destination) if listed.manifest is not None
    ]
    origins = [
        manifest.origin
        for manifest in manifests
        if manifest.project == project and manifest.origin
    ]

    # Refuse the checkpoint if each sample is known, and has none of its images.
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
    trained: Compared | None = None,
    outputs: tuple[Tensor, ...] | None = None,
) -> Exported:
    """Export *subject* as a bundle in *destination*, as `export_checkpoint` does.

    *trained* is its network if the caller has captured it already; then its last layer is not
    changed any more. *outputs* are its outputs for the generated images, if it ran on them; they
    are used only in precision fp32. Tells `progress.step` each step. Raises a `SopdeployError`
    if a step failed.
    """
    started = time.monotonic()
    has_photos = options.calibrate is not None or options.evaluate is not None
    accuracy_check = AccuracyCheck(subject, options) if has_photos else None
    preprocess = subject.preprocess
    parts = subject.detachment.training_only
    images = generated_images(preprocess.crop)

    # The folder of the bundle comes first, which checks that *destination* can be written.
    with publication.staging(destination) as folder, attributes_restored(subject.network):
        # Prove the statements about graphs.
        checks = Checks()
        if trained is None:
            step("capturing the network")
            _change_last_layer(subject, with_features=options.with_features)
            trained = Compared.of("trained", subject.network, preprocess, options.batch)
        kind = _prove_graphs(subject, trained, options, checks)

        # Convert its graph to ONNX, then to the precision.
        step("converting to ONNX")
        form_warnings: list[str] = []
        try:
            model = lower(trained.program, output_names(trained.network), form_warnings)
        except LoweringError:
            # The cause can be a graph that is not the network's.
            measure_plain_run(trained, preprocess, options.max_batch, parts)
            raise
        certified = Lowered(trained.network, trained.program, model)
        root = onnx_root(certified.model)
        if options.precision != "fp32":
            step(f"converting the graph to {options.precision}")
        user_images = (
            NO_IMAGES if accuracy_check is None else accuracy_check.images_to_convert()
        )
        converted = convert_precision(certified, preprocess, options, user_images)
        precision = converted.precision

        # Write the file, and measure what it and the network compute.
        (folder / GRAPH).write_bytes(converted.model.SerializeToString(deterministic=True))
        session = open_session(folder / GRAPH)
        if accuracy_check is not None:
            measured = accuracy_check.measure(certified.model, session)
            precision = precision.model_copy(update={"accuracy": measured})
            accuracy_check.check_drop(precision)
        checks.begin("Plain run")
        ordinary = np.stack([*ordinary_images(preprocess).values()])
        file_runs = run_with_neighbors(session, ordinary, options.max_batch)
        of_file = file_runs.outputs if options.precision == "fp32" else None
        with attributes_restored(subject.network):
            plain_runs = measure_plain_run(
                trained, preprocess, options.max_batch, parts, of_file
            )
        checks.begin("Images")
        check_mixing(file_runs.mixing, allowed=options.allow_batch_dependence)
        checks.begin("File")
        exact, parity = _compare_file(session, trained, converted, images, outputs, options)
        trained.check_unchanged(parts)

        # Collect what was proved and measured.
        shipped_root = root if options.precision == "fp32" else onnx_root(converted.model)
        certificate = Certificate(
            model=subject.name,
            proof=kind,
            compared=PROOFS[kind],
            detached=parts,
            **list_tensors(trained, parts),
            roots=Roots(
                any_batch=trained.root.sha256,
                num_operations=len(trained.root.nodes),
                onnx=root,
                shipped=shipped_root,
            ),
            batches=plain_runs.batches,
            num_images=len(images),
            mixes_images=file_runs.mixing,
            precision=options.precision,
            statements=checks.evidence(),
        )
        trained_costs, shipped_costs = count_costs(subject.network, parts, preprocess.crop)
        results = ExportResults(
            network=name_network(subject.name, subject.network, parts),
            certificate=certificate,
            parity=parity,
            precision=precision,
            trained=trained_costs,
            shipped=shipped_costs,
            second_order=count_second_order(converted.model),
            decision=subject.decision,
        )

        # Write the bundle.
        step("writing the bundle")
        probes = as_probes(images, exact, parity)
        write_probes(folder / "probes.npz", probes)
        write_golden_examples(
            subject, folder, session, converted.gate, parity, probes.tolerance[LOGITS]
        )
        manifest = write_reports(
            subject, folder, options, probes, results, converted.model.opset_import[0].version
        )
        path = publication.publish(folder, manifest, destination)
        seconds = time.monotonic() - started

    # `Exported` has the fields of `ExportResults`, its base class, and these. The page needs it.
    exported = Exported(
        **vars(results),
        path=path,
        manifest=manifest,
        warnings=(*subject.warnings, *plain_runs.warnings, *form_warnings),
        seconds=seconds,
    )
    return replace(exported, page=write_page(exported, subject.labels))


def _prove_graphs(
    subject: ExportSubject, trained: Compared, options: ExportOptions, checks: Checks
) -> ProofKind:
    """Prove the statements about the graph of the network of *subject*, which is captured as *trained*."""
    parts = subject.detachment.training_only
    with attributes_restored(subject.network):
        checks.begin("Removed")
        prove_removed(trained, parts)
        checks.begin("Graph")
        plain = _build_plain(subject.detachment, trained, subject.preprocess, options.batch)
        prove_graph(trained, plain)
    return kind_of_proof(plain, parts)


def _compare_file(
    session: InferenceSession,
    trained: Compared,
    converted: Converted,
    images: NDArray[np.uint8],
    outputs: tuple[Tensor, ...] | None,
    options: ExportOptions,
) -> tuple[ParityReference, ParityReport]:
    """Compare the file that *session* has loaded with the network *trained* on *images*, uint8 (P, H, W, 3).

    Returns the outputs of the network in float64 with their noise floors, and the comparison. The
    noise floors are errors of the run in *converted* or, in precision fp32, of *outputs*, if the
    network has run on *images* already. Raises the errors of `compute_reference` and `prove_file`.
    """
    if outputs is None or options.precision != "fp32":
        outputs = run_probes(converted.run, torch.from_numpy(images))
    exact = compute_reference(
        trained.deployed, images, outputs, options.precision, converted.gate
    )
    parity = prove_file(
        session,
        converted.model,
        exact,
        images,
        options.batch,
        allow_numerical_error=options.allow_numerical_error,
        order=find_order(trained.program),
    )
    return exact, parity


def _check_subject(subject: ExportSubject, options: ExportOptions) -> None:
    """Raise `ConfigError` for wrong labels, and `DetachError` for parts that *options* do not remove."""
    if problem := label_problem(subject.labels):
        raise ConfigError(f"{problem}; rename the class and train again")
    training_only = subject.detachment.training_only
    if not options.detach and has_tensors(subject.network, training_only):
        kind = type(subject.network).__name__
        parts = ", ".join(training_only)
        problem = f"{kind} still carries training-only parts ({parts})"
        raise DetachError(problem, remedies={"detach": True})


def _build_plain(
    detachment: Detachment, trained: Compared, preprocess: Preprocess, batch: BatchRange
) -> Compared | None:
    """Build and capture the plain network of *detachment*; None without a builder.

    A large constant of the *trained* program must then be in the plain one, too, made anew by its
    code. Raises the errors of `build_plain` and `check_constants`.
    """
    if detachment.plain is None:
        return None
    plain = build_plain(detachment, trained, preprocess, batch)
    if not detachment.allow_constants:
        check_constants(trained.trace.program, lambda: plain.trace.program)
    return plain
