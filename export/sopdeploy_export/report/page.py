"""Render `report.html`, a self-contained page about one export, and the model card of a bundle, `README.md`.

The page needs no network and no script.
"""

from collections.abc import Mapping
from typing import Any

from sopdeploy.bundle.manifest import FileRecord
from sopdeploy.html.templates import dimensions, percent, reduction, render
from sopdeploy.training.epoch_choice import HeldOutEstimate
from sopdeploy.training.procedure import read_record
from sopdeploy_export.parity.report import Flip, ParityReport
from sopdeploy_export.report.results import Results
from sopdeploy_export.subject import ExportSubject

Rows = list[tuple[str, ...]]
CAUSES = {
    "noise": "noise: the network's margin is within the tolerance",
    "routing": "routing: the gate was undecided",
    "error": "error: the network's margin is clear",
}
MAX_LABELS = 20
# The card itself contains no HTML and no links; names, classes and training records of a checkpoint could.
ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "[": "\\[", "]": "\\]"})


def render_report(
    subject: ExportSubject, results: Results, fields: Mapping[str, Any], files: Mapping[str, FileRecord]
) -> str:
    """Render the page; equal arguments give equal text.

    *fields* are those of the manifest; *files* are the files of the bundle except the page and the manifest.
    """
    labels, decision = subject.labels, results.decision
    tables = {
        **_network_tables(results),
        **_proof_tables(results, fields),
        **_parity_tables(results.parity, labels),
        "decision": [] if decision is None else decision.rows(labels),
        "types": list(results.precision.parts.items()),
        "files": [(name, f"{record.bytes:,}", record.sha256) for name, record in files.items()],
    }
    return render(
        "sopdeploy_export.report",
        "report.html",
        subject=subject,
        results=results,
        facts=results.facts(),
        tables=tables,
        versions=fields["versions"],
    )


def _network_tables(results: Results) -> dict[str, Rows]:
    trained, shipped = results.network_summary.trained, results.network_summary.shipped
    return {
        "costs": [
            (name, f"{before:,}", f"{after:,}", reduction(before, after))
            for name, before, after in (
                ("parameters", trained.parameters, shipped.parameters),
                ("multiply-adds", trained.macs, shipped.macs),
            )
        ],
    }


def _proof_tables(results: Results, fields: Mapping[str, Any]) -> dict[str, Rows]:
    roots, lineage = results.certificate.roots, fields["lineage"]
    return {
        "hashes": [
            ("graph for any batch size", roots.any_batch),
            ("graph for one image", roots.batch_of_one),
            ("ONNX graph before rewrites", roots.onnx),
            ("checkpoint (sha256)", lineage.checkpoint_sha256),
            ("model.onnx of this bundle", lineage.onnx_root),
        ],
        "removed": [
            (entry.name, dimensions(entry.shape) or "scalar", f"{entry.bytes:,}")
            for entry in results.certificate.removed
        ],
        "rules": [(rule.where, rule.name, rule.precondition, rule.effect) for rule in results.lowering.rules],
    }


def _parity_tables(parity: ParityReport, labels: tuple[str, ...]) -> dict[str, Rows]:
    short = "{:.3g}".format
    return {
        "outputs": [
            (
                name,
                short(output.largest_drift),
                short(output.noise_floor),
                f"{output.drift_in_floors:.2f}x",
                short(output.tolerance),
            )
            for name, output in parity.outputs.items()
        ],
        "flips": [flip_row(flip, labels) for flip in parity.top1.flipped],
        "usage": [
            (f"component {number}", percent(count / parity.images, 0))
            for number, count in enumerate(parity.routing.usage if parity.routing is not None else ())
        ],
    }


def flip_row(flip: Flip, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Describe one changed top class: image, class of the network, class of the file, margin, cause."""
    names = labels[flip.network], labels[flip.file]
    return str(flip.image), *names, f"{flip.margin:.3g}", CAUSES[flip.cause]


def render_model_card(subject: ExportSubject, results: Results, fields: Mapping[str, Any]) -> str:
    """Render the model card as Markdown; *fields* are those of the manifest."""
    preprocess, batch = subject.preprocess, fields["batch"]
    labels = ", ".join(subject.labels[:MAX_LABELS])
    if len(subject.labels) > MAX_LABELS:
        labels += f", ... ({len(subject.labels)} in total, see labels.json)"
    outputs = ", ".join(
        f"`{output.name}`: {output.dtype}, (batch, {', '.join(str(size) for size in output.shape[1:])})"
        for output in fields["outputs"]
    )
    training = "\n".join(
        f"- {key}: {' '.join(str(value).split())}" for key, value in training_rows(subject.training)
    )
    facts = "\n".join(f"- {name}: {text}" for name, text in results.facts().items())
    resizing = {
        "crop": f"Resize the\nshorter side of an image to {preprocess.resize} pixels "
        f"({preprocess.interpolation}), then crop the center;",
        "pad": f"Resize the\nlonger side of an image to {preprocess.crop} pixels "
        f"({preprocess.interpolation}), then center it on RGB {preprocess.background};",
        "squash": f"Resize both\nsides of an image to {preprocess.crop} pixels ({preprocess.interpolation});",
    }[preprocess.fit]
    card = f"""# {subject.name}

An image classifier exported by sopdeploy {fields["versions"]["sopdeploy"]}.

Classes: {labels}

## Use

    sopdeploy verify .
    sopdeploy predict . photo.jpg
    sopdeploy serve .

## Input and output

`{fields["inputs"][0].name}`: uint8, (batch, {preprocess.crop}, {preprocess.crop}, 3), RGB. {resizing}
the graph subtracts the mean and divides by the standard deviation. Batches of {batch.minimum} to
{batch.maximum} images. {outputs}

## Training

{training or "Not recorded."}

## Proof and measurements

{facts}

Noise floors are errors of the network's own {results.parity.precision} run against float64. model.onnx was
compared in {results.parity.runtime} ({results.parity.provider}). `report.html` has the details.
"""
    return card.translate(ESCAPES)


def training_rows(training: Mapping[str, Any]) -> list[tuple[str, object]]:
    """List the recorded scalars of *training* and its accuracy; for few-shot training, its images instead."""
    rows: list[tuple[str, object]] = []
    record = read_record(training)
    if record is not None:
        if start := training.get("start"):
            rows.append(("start weights", f"{start['network']}, {start['file']}, sha256 {start['sha256']}"))
        return [*rows, ("images", record.describe_images()), ("accuracy", record.describe_score())]
    rows = [
        (key, value)
        for key, value in sorted(training.items())
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    ]
    if "estimate" in training:
        rows.append(("accuracy", HeldOutEstimate.model_validate(training["estimate"]).describe()))
    return rows
