"""The export pipeline, from an `ExportSubject` to a bundle."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.base.project import Origin
from sopdeploy.bundle import publication
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.manifest import (
    LOGITS,
    PROOFS,
    BatchRange,
    PixelComparison,
    ProofKind,
    TemperatureScaling,
)
from sopdeploy.bundle.probes import write_probes
from sopdeploy.bundle.second_order import count_second_order
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.describe import describe_exported, name_network
from sopdeploy_export.admit.outputs import name_constant_classes
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.lower.accuracy import AccuracyCheck
from sopdeploy_export.lower.order import find_order, warn_of_order
from sopdeploy_export.lower.to_onnx import warn_of_opset
from sopdeploy_export.network import attributes_restored
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.bundle import (
    as_probes,
    write_golden_examples,
    write_reports,
)
from sopdeploy_export.pack.costs import count_costs
from sopdeploy_export.pack.graph_file import ExportedFile, write_file
from sopdeploy_export.pack.model_card import write_page
from sopdeploy_export.pack.results import Exported, ExportResults
from sopdeploy_export.progress import step
from sopdeploy_export.prove.certificate import Certificate, Checks, Roots, kind_of_proof
from sopdeploy_export.prove.constants import check_constants
from sopdeploy_export.prove.file import FileContent, ParityReport, prove_file
from sopdeploy_export.prove.graphs import prove_graph
from sopdeploy_export.prove.images import check_mixing, run_file
from sopdeploy_export.prove.networks import Compared, build_plain
from sopdeploy_export.prove.plain_run import PlainRuns, measure_plain_run
from sopdeploy_export.prove.reference import ParityReference, compute_reference
from sopdeploy_export.prove.removed import list_tensors, prove_removed
from sopdeploy_export.runs import LARGEST_BATCH, PlainOutputs, run_probes
from sopdeploy_export.subject import Detachment, ExportSubject

MANY_BYTES = 500_000_000  # of weights, which are worth the half second of a collection


class Captured(NamedTuple):
    """A captured network, a plain run of it, and how its classifier was divided before."""

    trained: Compared
    plain: PlainOutputs
    scaling: TemperatureScaling | None = None


def check_photos(
    options: ExportOptions,
    preprocess: Preprocess,
    labels: tuple[str, ...],
    decision: Decision | None,
    origin: Origin | None = None,
) -> AccuracyCheck | None:
    """Check the folders of photos in *options*; None if there is none.

    The callers do this before any step that takes time. The other arguments and the errors are those
    of `AccuracyCheck`.
    """
    has_photos = options.calibrate is not None or options.evaluate is not None
    return AccuracyCheck(options, preprocess, labels, decision, origin) if has_photos else None


class _Measured(NamedTuple):
    """What was measured: plain runs, the outputs that mix images, and the file against float64."""

    plain_runs: PlainRuns
    mixing: tuple[str, ...]
    exact: ParityReference
    parity: ParityReport


def export_subject(
    subject: ExportSubject,
    destination: Path,
    options: ExportOptions,
    capture: Callable[[], Captured],
    accuracy_check: AccuracyCheck | None,
    started: float,
) -> Exported:
    """Export *subject*, of a checkpoint or any other network, as a bundle in *destination*.

    *capture* runs and captures its network. *accuracy_check* is what `check_photos` returned, and the
    export began at *started*, in `time.monotonic`. Tells `progress.step` each step. Raises a
    `SopdeployError` if a step failed.
    """
    preprocess = subject.preprocess
    parts = subject.detachment.training_only
    images = generated_images(preprocess.crop)

    # The folder of the bundle comes first, which checks that *destination* can be written.
    with publication.staging(destination) as folder, attributes_restored(subject.network):
        captured = capture()
        trained, plain, _ = captured

        # Prove the statements about graphs, write the file, and measure the others.
        checks = Checks()
        checks.begin("Pixels")
        pixels = subject.compare_pixels()
        kind = _prove_graphs(trained, subject.detachment, preprocess, options.batch, checks)
        if sum(tensor.nbytes for tensor in trained.tensors.values()) > MANY_BYTES:
            gc.collect()  # the plain network refers to itself, so nothing else frees it
        file = write_file(trained, plain, subject, options, folder, accuracy_check)
        measured = _measure(trained, plain, file, images, parts, options, checks)

        # Write the bundle.
        certificate = _certify(subject, captured, kind, pixels, file, measured, checks)
        results = _collect(subject, certificate, file, measured)
        step("writing the bundle")
        probes = as_probes(images, measured.exact, measured.parity)
        write_probes(folder / "probes.npz", probes)
        write_golden_examples(
            folder,
            file.session,
            preprocess,
            trained.network,
            file.converted.gate,
            measured.parity,
            probes.tolerance[LOGITS],
        )
        opset = file.converted.model.opset_import[0].version
        manifest = write_reports(subject, folder, options, probes, results, opset)
        path = publication.publish(folder, manifest, destination)
        seconds = time.monotonic() - started

    # `Exported` has the fields of `ExportResults`, its base class, and these. The page needs it.
    exported = Exported(
        **vars(results),
        path=path,
        manifest=manifest,
        warnings=(
            *subject.warnings,
            *name_constant_classes(subject.network, plain.outputs[0], subject.labels),
            *measured.plain_runs.warnings,
            *(accuracy_check.warnings if accuracy_check is not None else ()),
            *warn_of_order(measured.exact.order),
            *warn_of_opset(file.converted.model),
        ),
        seconds=seconds,
    )
    return replace(exported, page=write_page(exported, subject.labels))


def _prove_graphs(
    trained: Compared,
    detachment: Detachment,
    preprocess: Preprocess,
    batch: BatchRange,
    checks: Checks,
) -> ProofKind:
    """Prove the statements about the graph of *trained*, from which *detachment* removes parts."""
    parts = detachment.training_only
    with attributes_restored(trained.network):
        checks.begin("Removed")
        prove_removed(trained, parts)
        checks.begin("Graph")
        plain = _build_plain(detachment, trained, preprocess, batch)
        prove_graph(trained, plain)
    return kind_of_proof(plain, parts)


def _measure(
    trained: Compared,
    plain: PlainOutputs,
    file: ExportedFile,
    images: NDArray[np.uint8],
    parts: tuple[str, ...],
    options: ExportOptions,
    checks: Checks,
) -> _Measured:
    """Measure the statements about runs: the run *plain* of the network *trained*, and runs of *file*.

    *images*, uint8 (P, H, W, 3), are the last ones of *plain*, which are compared with the network in float64.
    *parts* of the network are removed.
    """
    is_float32 = options.precision == "fp32"

    # The file runs first, because the network is compared with it.
    checks.begin("Plain run")
    file_runs = run_file(file.session, np.stack([*plain.images.values()]), options.batch)
    with attributes_restored(trained.network):
        plain_runs = measure_plain_run(
            trained,
            plain,
            options.max_batch,
            parts,
            file_runs.outputs if is_float32 else None,
        )
    checks.begin("Images")
    check_mixing(file_runs.mixing, allowed=options.allow_batch_dependence)

    checks.begin("File")
    if is_float32:
        rounded = tuple(output[-len(images) :] for output in plain.outputs)
    else:
        rounded = run_probes(file.converted.run, torch.from_numpy(images))
    exact = compute_reference(
        trained.deployed,
        images,
        rounded,
        options.precision,
        file.converted.gate,
        find_order(trained.program),
    )
    parity = prove_file(
        file.session,
        FileContent.of(file.converted.model, file.num_bytes),
        exact,
        images,
        options.batch,
        ran={
            options.batch.optimum: file_runs.in_optimum,
            min(LARGEST_BATCH, options.max_batch): {
                name: rows[-len(images) :] for name, rows in file_runs.outputs.items()
            },
        },
        allow_numerical_error=options.allow_numerical_error,
    )
    return _Measured(plain_runs, file_runs.mixing, exact, parity)


def _certify(
    subject: ExportSubject,
    captured: Captured,
    kind: ProofKind,
    pixels: PixelComparison | None,
    file: ExportedFile,
    measured: _Measured,
    checks: Checks,
) -> Certificate:
    """Write down what was proved and measured."""
    trained = captured.trained
    parts = subject.detachment.training_only
    return Certificate(
        model=subject.name,
        proof=kind,
        compared=PROOFS[kind],
        detached=parts,
        **list_tensors(trained, parts),
        roots=Roots(
            any_batch=trained.root.sha256,
            num_operations=len(trained.root.nodes),
            onnx=file.root,
            shipped=file.shipped_root,
        ),
        batches=measured.plain_runs.batches,
        num_images=measured.parity.num_images,
        mixes_images=measured.mixing,
        precision=measured.parity.precision,
        statements=checks.evidence(),
        temperature_scaling=captured.scaling,
        pixels=pixels,
    )


def _collect(
    subject: ExportSubject, certificate: Certificate, file: ExportedFile, measured: _Measured
) -> ExportResults:
    """Collect the results of the checks, and the costs of the trained network and of the exported one."""
    network = subject.network
    parts = subject.detachment.training_only
    trained_costs, shipped_costs = count_costs(network, parts, subject.preprocess)
    return ExportResults(
        network=name_network(subject.name, network, parts),
        headline=describe_exported(
            subject.name, network, parts, len(subject.labels), shipped_costs.parameters
        ),
        certificate=certificate,
        parity=measured.parity,
        precision=file.precision,
        trained=trained_costs,
        shipped=shipped_costs,
        second_order=count_second_order(file.converted.model),
        decision=subject.decision,
    )


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
