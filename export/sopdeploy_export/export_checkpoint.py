"""Export a checkpoint of a network of the catalog, and capture its program again."""

import time
from functools import partial
from pathlib import Path

import torch
from torch.export import ExportedProgram

from sopdeploy.base.names import label_problem
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.listing import read_bundles
from sopdeploy.bundle.manifest import (
    EMBEDDING,
    Manifest,
    PixelComparison,
    TemperatureScaling,
)
from sopdeploy.errors import CertificateError, CheckpointError, ConfigError, DetachError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy.weights.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy_export.admit.network import (
    check_exportable,
    check_size,
    check_torch_state,
    weight_bytes,
)
from sopdeploy_export.admit.outputs import check_depends_on_images, run_first
from sopdeploy_export.capture.deployed import Deployed, export_images, generated_images
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.last_layer import add_embedding_output, fold_temperature
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.pipeline import Captured, check_photos, export_subject
from sopdeploy_export.pixels.compare import PixelCheck
from sopdeploy_export.pixels.own_training import pixels_of_training
from sopdeploy_export.program_hashes import program_root
from sopdeploy_export.progress import Step, reporting, step
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.removed import has_tensors
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
    started = time.monotonic()
    if options is None:
        options = ExportOptions()
    checkpoint = read_checkpoint(path)
    network = build_classifier(checkpoint, path)
    detachment = Detachment.of(network)
    training_only = detachment.training_only
    decision = checkpoint.decision
    if decision is not None and options.trained_logits:
        decision = decision.for_trained_logits()

    # Check what needs no run of the network.
    check_torch_state()
    check_exportable(network, training_only)
    warnings = check_size(weight_bytes(network, training_only), options.precision)
    project = options.name or checkpoint.project or checkpoint.model.replace(":", "-")
    # A server would replace a bundle of the same name, so one that was trained on other images is
    # refused; not if the user gave the name, who may want to replace it.
    if options.name is None:
        refuse_other_images(destination, project, checkpoint)
    _check_labels_and_parts(checkpoint.labels, network, training_only, detach=options.detach)
    accuracy_check = check_photos(
        options, checkpoint.preprocess, checkpoint.labels, decision, checkpoint.origin
    )

    # The pixels of the training are read by its own code, which need not be the server's for ever.
    several_classes = decision is not None and decision.is_multi_label
    compare_pixels = partial(
        _compare_pixels, network, checkpoint.preprocess, several_classes=several_classes
    )
    subject = ExportSubject(
        name=checkpoint.model,
        project=project,
        network=network,
        detachment=detachment,
        labels=checkpoint.labels,
        preprocess=checkpoint.preprocess,
        config=checkpoint.config,
        sha256=checkpoint.sha256,
        decision=decision,
        training=checkpoint.training,
        origin=checkpoint.origin,
        compare_pixels=compare_pixels,
        warnings=warnings,
    )
    capture = partial(
        _run_and_capture,
        network,
        checkpoint.preprocess,
        len(checkpoint.labels),
        decision,
        options,
    )
    del checkpoint  # frees its weights, of which the network has copies
    with reporting(on_step):
        return export_subject(subject, destination, options, capture, accuracy_check, started)


def _compare_pixels(
    network: Classifier, rules: Preprocess, *, several_classes: bool
) -> PixelComparison:
    """Compare the pixels of the training of *network* with those of its *rules* on a server.

    Raises `CertificateError` if they differ by more than rounding.
    """
    check = PixelCheck(pixels_of_training(network, rules), None, allowed=True)
    comparison = check.run(network, rules, several_classes=several_classes)
    if comparison.differences:
        raise CertificateError(
            f"the server gives the network other pixels than the training: {comparison.describe()}; report this "
            "as a bug"
        )
    return comparison


def _check_labels_and_parts(
    labels: tuple[str, ...],
    network: Classifier,
    training_only: tuple[str, ...],
    *,
    detach: bool,
) -> None:
    """Raise `ConfigError` for wrong *labels*, and `DetachError` for parts of *network* that stay without *detach*."""
    if problem := label_problem(labels):
        raise ConfigError(f"{problem}; rename the class and train again")
    if not detach and has_tensors(network, training_only):
        kind = type(network).__name__
        parts = ", ".join(training_only)
        problem = f"{kind} still carries training-only parts ({parts})"
        raise DetachError(problem, remedies={"detach": True})


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


def _run_and_capture(
    network: Classifier,
    preprocess: Preprocess,
    num_classes: int,
    decision: Decision | None,
    options: ExportOptions,
) -> Captured:
    """Run *network*, which is one of the catalog, and capture it.

    Raises `LoweringError` if its logits are the same for all images, and the errors of the capture.
    """
    step("running the network")
    scaling = _change_last_layer(
        network, preprocess, num_classes, decision, with_features=options.with_features
    )
    plain = run_first(
        Deployed(network, preprocess).eval(),
        export_images(preprocess),
        num_classes,
        options.max_batch,
    )
    check_depends_on_images(
        network,
        plain.outputs[0],
        several_classes=decision is not None and decision.is_multi_label,
        allowed=options.allow_numerical_error,
        advice="train longer",
    )

    step("capturing the network")
    return Captured(Compared.of("trained", network, preprocess, options.batch), plain, scaling)


def _change_last_layer(
    network: Classifier,
    preprocess: Preprocess,
    num_classes: int,
    decision: Decision | None,
    *,
    with_features: bool,
) -> TemperatureScaling | None:
    """Fold the temperature of *decision* into the last linear layer of *network*, in place.

    Returns what was divided: nothing with a temperature of 1, or if the decision divides the logits
    itself. With *with_features*, the input of this layer becomes an output. Raises `LoweringError` if
    one of the two is to be done and no linear layer computes the logits.
    """
    images = generated_images(preprocess.crop)
    if with_features:
        add_embedding_output(network, preprocess, images, num_classes)
    if decision is None or decision.temperature == 1 or decision.divides_logits:
        return None
    return fold_temperature(network, decision.temperature, preprocess, images, num_classes)


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
    network = build_classifier(checkpoint, path)
    preprocess = checkpoint.preprocess

    # The changes that the export made before it captured the network. The decision of the bundle
    # says whether the classifier was divided.
    has_embedding = EMBEDDING in [output.name for output in manifest.outputs]
    _change_last_layer(
        network,
        preprocess,
        len(checkpoint.labels),
        manifest.decision,
        with_features=has_embedding,
    )

    program = capture_any_batch(network, preprocess, manifest.batch)
    root = program_root(program).sha256
    if root != lineage.program_root:
        raise CertificateError(
            f"{path}: torch {torch.__version__} captures a program with the graph hash "
            f"{root[:16]}, but the bundle has {lineage.program_root[:16]}; "
            f"use torch {manifest.versions.get('torch')}"
        )
    return program
