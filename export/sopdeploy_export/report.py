"""Render `report.html`, a self-contained page about one export, and the model card of a bundle, `README.md`.

The page needs no network and no script.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sopdeploy.bundle.manifest import Lineage
from sopdeploy.environment import EXACT_INT8
from sopdeploy.html.report import HtmlReport, Section, Table, render, sanitize
from sopdeploy_export.proof.networks import ExportSubject
from sopdeploy_export.results import ExportResults, ParityReport

NO_PLAIN_NETWORK = (
    "No plain network was given, so the proof does not cover code that the compared networks share."
)
SEVERAL_CLASSES = "A class is present in an image if the sigmoid of its logit reaches its threshold."
TEMPERATURE = (
    "The weights and the bias of the last layer are those of the checkpoint divided by the temperature, so "
    "the proof and the drift on this page hold for calibrated logits."
)
MAX_LABELS = 20
# An underscore between two letters or digits emphasizes nothing.
MARKDOWN = re.compile(r"([\\`*\[\]#~|!@]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//))", re.IGNORECASE)
INT8_SESSION = f"""
In a program of your own, open model.onnx with this option. Without it, ONNX Runtime computes other results on
x86 processors without VNNI:

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("{EXACT_INT8[0]}", "{EXACT_INT8[1]}")
    session = onnxruntime.InferenceSession("model.onnx", options)
"""


def render_report(subject: ExportSubject, results: ExportResults, lineage: Lineage) -> str:
    """Render the page; equal arguments give equal text."""
    parity, trained, shipped = results.parity, results.trained, results.shipped
    passed = (
        "All checks passed." if parity.passed else "The drift exceeds its limit; --allow-drift accepted it."
    )
    tiles = {
        "parameters": f"{shipped.parameters:,} of {trained.parameters:,}",
        "multiply-adds": f"{shipped.macs:,} of {trained.macs:,}",
        "precision": results.precision.precision,
        "drift": f"{parity.logits.drift_in_floors:.1f}x noise floor",
        "same top class": f"{parity.num_agreeing} of {parity.num_images}",
        "model.onnx": f"{parity.file_bytes:,} bytes",
    }
    labels = f"{len(subject.labels)} classes: {', '.join(subject.labels[:MAX_LABELS])}"
    if len(subject.labels) > MAX_LABELS:
        labels += f" and {len(subject.labels) - MAX_LABELS} more, see labels.json"
    sections = [
        _describe_checks(results, lineage),
        _describe_drift(results.parity),
        _describe_decision(subject, results),
    ]
    text = [passed, f"Network {subject.name}. {labels}"]
    return render(HtmlReport(title=subject.project, text=text, tiles=tiles, sections=sections))


def _describe_checks(results: ExportResults, lineage: Lineage) -> Section:
    """List what was proved and measured, hashes and removed tensors."""
    certificate = results.certificate
    hashes = [
        ("graph for any batch size", certificate.roots.any_batch),
        ("graph for one image", certificate.roots.batch_of_one),
        ("certified ONNX graph", certificate.roots.onnx),
        ("checkpoint (sha256)", lineage.checkpoint_sha256),
        ("model.onnx of this bundle", lineage.onnx_root),
    ]
    removed = [
        (entry.name, " x ".join(map(str, entry.shape)), f"{entry.bytes:,}") for entry in certificate.removed
    ]
    facts = list(results.facts().items())
    tables = [
        Table(caption="What was proved and measured", columns=("check", "result"), rows=facts),
        Table(caption="Hashes: equal hashes mean equal graphs", columns=("of", "hash"), rows=hashes),
        Table(caption="All removed tensors", columns=("tensor", "shape", "bytes"), rows=removed, folded=True),
    ]
    text = [] if "plain" in certificate.compared else [NO_PLAIN_NETWORK]
    return Section(title="Checks", text=text, tables=tables)


def _describe_drift(parity: ParityReport) -> Section:
    """Compare the outputs of the file with those of the network in float64."""
    verdict = "is within" if parity.passed else "EXCEEDS"
    text = [
        f"The noise floor is the error of the network's own {parity.precision} run against float64.",
        f"The drift {verdict} the limit of {parity.floors_allowed:g} noise floors, measured with "
        f"{parity.runtime} on {parity.num_images} probe images.",
    ]
    rows = [
        (
            name,
            f"{output.largest_drift:.3g}",
            f"{output.noise_floor:.3g}",
            f"{output.drift_in_floors:.2f}x",
            f"{output.tolerance:.3g}",
        )
        for name, output in parity.outputs.items()
    ]
    columns = ("output", "max drift", "noise floor", "in noise floors", "limit")
    table = Table(caption="Outputs of model.onnx", columns=columns, rows=rows)
    return Section(title="Drift", text=text, tables=[table])


def _describe_decision(subject: ExportSubject, results: ExportResults) -> Section:
    """Describe the fitted temperature and thresholds, if there are any."""
    if results.decision is None:
        return Section(title="Decision")
    rows = results.decision.rows(subject.labels)
    caption = "Fitted to predictions of images that were not used for training"
    text = SEVERAL_CLASSES if results.decision.thresholds else TEMPERATURE
    return Section(
        title="Decision", text=[text], tables=[Table(caption=caption, columns=("", ""), rows=rows)]
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
    result = None
    if "procedure" in training:
        from sopdeploy.training.results import LoopResult, read_result  # noqa: PLC0415 # most exports need none

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
