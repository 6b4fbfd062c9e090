"""Render `report.html`, a self-contained page about one export, and the model card of a bundle, `README.md`.

The page needs no network and no script.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sopdeploy.bundle.manifest import FileRecord
from sopdeploy.environment import EXACT_INT8
from sopdeploy.html.templates import dimensions, percent, reduction, render, sanitize
from sopdeploy.training.epoch_choice import LoopResult
from sopdeploy.training.procedure import read_result
from sopdeploy_export.report.results import ExportResults
from sopdeploy_export.subject import ExportSubject

CAUSES = {
    "noise": "noise: the network's margin is within the tolerance",
    "routing": "routing: the gate was undecided",
    "error": "error: the network's margin is clear",
}
MAX_LABELS = 20
MARKDOWN = re.compile(r"([\\`*_\[\]#~|!@]|(?<=www)\.|:(?=//))", re.IGNORECASE)
INT8_SESSION = f"""
In a program of your own, open model.onnx with this option. Without it, ONNX Runtime computes other results on
x86 processors without VNNI:

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("{EXACT_INT8[0]}", "{EXACT_INT8[1]}")
    session = onnxruntime.InferenceSession("model.onnx", options)
"""


def render_report(
    subject: ExportSubject, results: ExportResults, fields: Mapping[str, Any], files: Mapping[str, FileRecord]
) -> str:
    """Render the page; equal arguments give equal text.

    *fields* are those of the manifest; *files* are the files of the bundle except the page and the manifest.
    """
    certificate, lineage, parity = results.certificate, fields["lineage"], results.parity
    trained, shipped = results.network_summary.trained, results.network_summary.shipped
    usage = () if parity.routing is None else parity.routing.usage
    tables = {
        "hashes": [
            ("graph for any batch size", certificate.roots.any_batch),
            ("graph for one image", certificate.roots.batch_of_one),
            ("ONNX graph before rewrites", certificate.roots.onnx),
            ("checkpoint (sha256)", lineage.checkpoint_sha256),
            ("model.onnx of this bundle", lineage.onnx_root),
        ],
        "removed": [
            (entry.name, dimensions(entry.shape) or "scalar", f"{entry.bytes:,}")
            for entry in certificate.removed
        ],
        "costs": [
            (name, f"{before:,}", f"{after:,}", reduction(before, after))
            for name, before, after in (
                ("parameters", trained.parameters, shipped.parameters),
                ("multiply-adds", trained.macs, shipped.macs),
            )
        ],
        "rules": [(rule.where, rule.name, rule.precondition, rule.effect) for rule in results.lowering.rules],
        "outputs": [
            (
                name,
                f"{output.largest_drift:.3g}",
                f"{output.noise_floor:.3g}",
                f"{output.drift_in_floors:.2f}x",
                f"{output.tolerance:.3g}",
            )
            for name, output in parity.outputs.items()
        ],
        "flips": [
            (
                str(flip.image),
                subject.labels[flip.network],
                subject.labels[flip.file],
                f"{flip.margin:.3g}",
                CAUSES[flip.cause],
            )
            for flip in parity.top1.flipped
        ],
        "usage": [
            (f"component {number}", percent(count / parity.num_images, 0))
            for number, count in enumerate(usage)
        ],
        "decision": [] if results.decision is None else results.decision.rows(subject.labels),
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


def render_model_card(subject: ExportSubject, results: ExportResults, fields: Mapping[str, Any]) -> str:
    """Render the model card as Markdown; *fields* are those of the manifest.

    Names, classes, facts and training records, which a checkpoint contains, are text without markup.
    """
    preprocess, batch = subject.preprocess, fields["batch"]
    labels = ", ".join(map(as_markdown, subject.labels[:MAX_LABELS]))
    if len(subject.labels) > MAX_LABELS:
        labels += f", ... ({len(subject.labels)} in total, see labels.json)"
    outputs = ", ".join(
        f"`{output.name}`: {output.dtype}, (batch, {', '.join(str(size) for size in output.shape[1:])})"
        for output in fields["outputs"]
    )
    training = "\n".join(
        f"- {as_markdown(key)}: {as_markdown(str(value))}" for key, value in training_rows(subject.training)
    )
    facts = "\n".join(f"- {name}: {as_markdown(text)}" for name, text in results.facts().items())
    resizing = {
        "crop": f"Resize the\nshorter side of an image to {preprocess.resize} pixels "
        f"({preprocess.interpolation}), then crop the center;",
        "pad": f"Resize the\nlonger side of an image to {preprocess.crop} pixels "
        f"({preprocess.interpolation}), then center it on RGB {preprocess.background};",
        "squash": f"Resize both\nsides of an image to {preprocess.crop} pixels ({preprocess.interpolation});",
    }[preprocess.fit]
    int8 = results.precision.quantisation
    option = INT8_SESSION if int8 is not None and int8.runtime == "cpu" else ""
    return f"""# {subject.project}

An image classifier, the network {subject.name}, exported by sopdeploy {fields["versions"]["sopdeploy"]}.

Classes: {labels}

## Use

    sopdeploy verify .
    sopdeploy predict . photo.jpg
    sopdeploy serve .
{option}
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


def as_markdown(text: str) -> str:
    """Write *text* on one line such that Markdown shows it as it is, without links, markup or HTML."""
    shown = sanitize(" ".join(text.split()))
    return MARKDOWN.sub(r"\\\1", shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def training_rows(training: Mapping[str, Any]) -> Sequence[tuple[str, object]]:
    """List the result of *training*, for the training loop after its scalars, otherwise its start weights."""
    result = read_result(training)
    if result is not None and not isinstance(result, LoopResult):
        rows = list(result.rows())
        if start := training.get("start"):
            weights = f"{start['network']}, {start['file']}, sha256 {start['sha256']}"
            rows.insert(0, ("start weights", weights))
        return rows
    scalars: list[tuple[str, object]] = [
        (key, value)
        for key, value in sorted(training.items())
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    ]
    return [*scalars, *(() if result is None else result.rows())]
