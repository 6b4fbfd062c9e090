"""Render `report.html`, a self-contained page about one export, and the model card of a bundle, `README.md`.

The page needs no network and no script.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.html.charts import Bar, bars
from sopdeploy.html.templates import dimensions, percent, reduction, render, short_number
from sopdeploy.training.epoch_choice import HeldOutEstimate
from sopdeploy.training.procedure import read_record
from sopdeploy_export.parity.report import Flip, ParityReport
from sopdeploy_export.precision.report import PrecisionReport
from sopdeploy_export.proof.certificate import Certificate
from sopdeploy_export.report.network_summary import draw_network
from sopdeploy_export.report.results import ExportResults, describe_top1
from sopdeploy_export.subject import ExportSubject

Rows = list[tuple[str, ...]]
CAUSES = {
    "noise": "noise: the network's margin is within the tolerance",
    "routing": "routing: the gate was undecided",
    "error": "error: the network's margin is clear",
}


def render_report(results: ExportResults) -> str:
    """Render the page; equal *results* give equal text."""
    labels, decision = results.subject.labels, results.subject.decision
    charts_and_rows = {
        "drawing": draw_network(results.network_summary),
        "network": _network_tables(results),
        "proof": _proof_tables(results),
        "drift": _drift_tables(results.parity),
        "drift_chart": _drift_chart(results.parity),
        "flip_rows": [flip_row(flip, labels) for flip in results.parity.top1.flipped],
        "gate_chart": _gate_chart(results.parity),
        "decision": [] if decision is None else decision.rows(labels),
        "precision": _precision_tables(results.precision),
    }
    return render("sopdeploy_export.report", "report.html", results=results, **charts_and_rows)


def _network_tables(results: ExportResults) -> dict[str, Rows]:
    trained, shipped = results.network_summary.trained, results.network_summary.shipped
    return {
        "costs": [
            (name, f"{before:,}", f"{after:,}", reduction(before, after))
            for name, before, after in (
                ("parameters", trained.parameters, shipped.parameters),
                ("multiply-adds", trained.macs, shipped.macs),
            )
        ],
        "parts": [
            (
                part.name,
                part.kind,
                dimensions(part.shape) or "none",
                short_number(part.parameters),
                short_number(part.macs),
                "removed" if part.training_only else "exported",
            )
            for part in results.network_summary.parts
        ],
    }


def _proof_tables(results: ExportResults) -> dict[str, Rows]:
    roots, lowering = results.certificate.roots, results.lowering
    lineage = results.fields["lineage"]
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
        "rules": [(rule.where, rule.name, rule.precondition, rule.effect) for rule in lowering.rules],
        "files": [(name, f"{record.bytes:,}", record.sha256) for name, record in results.files.items()],
    }


def _drift_tables(parity: ParityReport) -> dict[str, Rows]:
    short = "{:.3g}".format
    outputs: Rows = [
        (name, short(o.largest_drift), short(o.noise_floor), f"{o.drift_in_floors:.2f}x", short(o.tolerance))
        for name, o in parity.outputs.items()
    ]
    spectral: Rows = [
        (r.part, str(r.iterations), short(r.residual), short(r.residual_exact), short(r.asymmetry))
        for r in parity.spectral
    ]
    return {"outputs": outputs, "spectral": spectral}


def _drift_chart(parity: ParityReport) -> Markup | None:
    """Draw the drift per module in noise floors."""
    if not parity.parts:
        return None
    limit = parity.floors_allowed
    rows = [
        Bar(label=part.part, value=part.in_floors, text=f"{part.in_floors:.2f}x") for part in parity.parts
    ]
    marks = ((1.0, "noise floor"), (limit, f"limit {limit:g}x"))
    longest = max(limit, *(part.in_floors for part in parity.parts))
    return bars("parts", "Drift of each module in noise floors", rows, longest, marks)


def flip_row(flip: Flip, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Describe one changed top class: image, class of the network, class of the file, margin, cause."""
    names = labels[flip.network], labels[flip.file]
    return str(flip.image), *names, f"{flip.margin:.3g}", CAUSES[flip.cause]


def _gate_chart(parity: ParityReport) -> Markup | None:
    if parity.routing is None:
        return None
    usage, images = parity.routing.usage, parity.images
    rows = [
        Bar(label=f"component {number}", value=count / images, text=percent(count / images, 0))
        for number, count in enumerate(usage)
    ]
    uniform = sum(usage) / (images * len(usage))
    title = "Fraction of probe images routed to each component"
    return bars("usage", title, rows, 1.0, ((uniform, f"uniform: {percent(uniform)}"),))


def _precision_tables(report: PrecisionReport) -> dict[str, Rows]:
    accuracy: Rows = []
    if (found := report.accuracy) is not None:
        interval = f"{percent(found.low)} to {percent(found.high)}"
        accuracy.append(("same top class", f"{found.agree} of {found.images} ({interval})"))
        if found.before is not None and found.after is not None:
            accuracy.append(("top-1 in float32", describe_top1(found.before, found.images)))
            accuracy.append(("top-1 as exported", describe_top1(found.after, found.images)))
        accuracy.append(("drop", f"{found.drop:.2f} points"))
    parts: Rows = []
    for part in report.parts:
        operations = ", ".join(f"{count} in {name}" for name, count in part.operations.items())
        parts.append((part.part, part.weights or "none", operations or "none"))
    tried: Rows = []
    if report.quantisation is not None:
        tried = [
            (entry.calibration, ", ".join(entry.in_float32) or "none", f"{entry.drop:.2f} points")
            for entry in report.quantisation.tried
        ]
    return {"accuracy": accuracy, "parts": parts, "tried": tried}


MAX_LABELS = 20
# The card itself contains no HTML and no links; names, classes and training records of a checkpoint could.
ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "[": "\\[", "]": "\\]"})
TARGETS: Mapping[Int8For, str] = {
    "cpu": "for CPUs (TensorRT does not accept this form)",
    "tensorrt": "for TensorRT (CPUs run this form slower than float32)",
}


def render_model_card(
    subject: ExportSubject,
    certificate: Certificate,
    parity: ParityReport,
    precision: PrecisionReport,
    fields: Mapping[str, Any],
) -> str:
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
{_decision_lines(subject)}
## Proof

{_proof_lines(certificate)}

## Parity

{_parity_lines(parity)}

## Precision

{_precision_lines(precision)}
"""
    return card.translate(ESCAPES)


def training_rows(training: Mapping[str, Any]) -> list[tuple[str, object]]:
    """List the recorded scalars of *training* and its accuracy; for few-shot training, its images instead."""
    rows: list[tuple[str, object]] = []
    found = read_record(training)
    if found is not None:
        if start := training.get("start"):
            rows.append(("start weights", f"{start['network']}, {start['file']}, sha256 {start['sha256']}"))
        return [*rows, ("images", found.describe_images()), ("accuracy", found.describe_score())]
    rows = [
        (key, value)
        for key, value in sorted(training.items())
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    ]
    if "estimate" in training:
        rows.append(("accuracy", HeldOutEstimate.model_validate(training["estimate"]).describe()))
    return rows


def _decision_lines(subject: ExportSubject) -> str:
    """Describe calibration, rejection and thresholds; empty without them."""
    if subject.decision is None or not (rows := subject.decision.rows(subject.labels)):
        return ""
    lines = "\n".join(f"- {name}: {text}" for name, text in rows)
    if subject.decision.thresholds is not None:
        return f"""
## Thresholds

{lines}

A class is present in an image if the sigmoid of its logit reaches its threshold.
"""
    return f"""
## Calibration and unknown images

{lines}

The weights and the bias of the last layer are those of the checkpoint divided by the temperature.
"""


def _proof_lines(certificate: Certificate) -> str:
    removed = "nothing"
    if certificate.removed:
        tensors = f"{len(certificate.removed)} tensors, {certificate.bytes_removed} bytes"
        removed = f"{', '.join(certificate.detached)} ({tensors})"
    return f"""- removed: {removed}
- kept: {len(certificate.kept)} tensors, each with the same sha256 before and after
- compared: {" = ".join(certificate.compared)} ({certificate.proof}), with equal graphs
  ({certificate.roots.any_batch[:16]}) and bitwise equal logits on {certificate.images} probe images"""


def _parity_lines(parity: ParityReport) -> str:
    state = "passed" if parity.passed else "DID NOT PASS, the drift was allowed"
    top1, logits = parity.top1, parity.logits
    lines = [
        f"- {state}: model.onnx in {parity.runtime} ({parity.provider}) against the network in float64",
        f"- logits: max drift {logits.largest_drift:.3g} ({logits.drift_in_floors:.1f}x {parity.precision} "
        f"noise floor, limit {parity.floors_allowed:g}x)",
        f"- same top class on {top1.agree} of {top1.images} probe images (95 % interval "
        f"{100 * top1.low:.1f} to {100 * top1.high:.1f} %)",
    ]
    if parity.emulation is not None:
        lines.append(f"- {parity.emulation}")
    return "\n".join(lines)


def _precision_lines(report: PrecisionReport) -> str:
    types = ", ".join(f"{count} modules in {name}" for name, count in report.summary().items())
    lines = [f"- {report.precision}: weights of {types}; by module in `precision.json`"]
    if (int8 := report.quantisation) is not None:
        kept = ", ".join((*int8.kept, *int8.in_float32)) or "none"
        lines.append(
            f"- {int8.layers} convolutions in int8 {TARGETS[int8.runtime]}, ranges by {int8.calibration} on "
            f"{int8.images} images; layers in float32: {kept}"
        )
    if (found := report.accuracy) is not None:
        text = (
            f"same top class as float32 on {found.agree} of {found.images} images "
            f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %)"
        )
        if found.before is not None and found.after is not None:
            before, after = (describe_top1(share, found.images) for share in (found.before, found.after))
            text = f"top-1 {before} before, {after} after; {text}"
        lines.append(f"- {text}")
    return "\n".join(lines)
