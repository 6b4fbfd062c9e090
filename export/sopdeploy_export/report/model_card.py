"""Render the model card of a bundle, its `README.md`."""

from collections.abc import Mapping
from typing import Any

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.checkpoint import Checkpoint
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.precision.report import PrecisionReport
from sopdeploy_export.proof.certificate import Certificate

MAX_LABELS = 20
TARGETS: Mapping[Int8For, str] = {
    "cpu": "for CPUs (TensorRT does not accept this form)",
    "tensorrt": "for TensorRT (CPUs run this form slower than float32)",
}


def render_model_card(
    checkpoint: Checkpoint,
    certificate: Certificate,
    parity: ParityReport,
    precision: PrecisionReport,
    fields: Mapping[str, Any],
) -> str:
    """Render the model card as Markdown; *fields* are those of the manifest."""
    preprocess, batch = checkpoint.preprocess, fields["batch"]
    labels = ", ".join(checkpoint.labels[:MAX_LABELS])
    if len(checkpoint.labels) > MAX_LABELS:
        labels += f", ... ({len(checkpoint.labels)} in total, see labels.json)"
    outputs = ", ".join(
        f"`{output.name}`: {output.dtype}, (batch, {', '.join(str(size) for size in output.shape[1:])})"
        for output in fields["outputs"]
    )
    training = "\n".join(
        f"- {key}: {value}"
        for key, value in sorted(checkpoint.training.items())
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    )
    return f"""# {checkpoint.model}

An image classifier exported by sopdeploy {fields["versions"]["sopdeploy"]}.

Classes: {labels}

## Use

    sopdeploy verify .
    sopdeploy predict . photo.jpg
    sopdeploy serve .

## Input and output

`{fields["inputs"][0].name}`: uint8, (batch, {preprocess.crop}, {preprocess.crop}, 3), RGB. Resize the
shorter side of an image to {preprocess.resize} pixels ({preprocess.interpolation}), then crop the center;
the graph subtracts the mean and divides by the standard deviation. Batches of {batch.minimum} to
{batch.maximum} images. {outputs}

## Training

{training or "Not recorded."}

## Proof

{_proof_lines(certificate)}

## Parity

{_parity_lines(parity)}

## Precision

{_precision_lines(precision)}
"""


def _proof_lines(certificate: Certificate) -> str:
    removed = "nothing"
    if certificate.removed:
        tensors = f"{len(certificate.removed)} tensors, {certificate.bytes_removed} bytes"
        removed = f"{', '.join(certificate.detached)} ({tensors})"
    return f"""- removed: {removed}
- kept: {len(certificate.kept)} tensors, each with the same sha256 before and after
- graphs: the trained, detached and plain network have the same hash {certificate.roots.any_batch[:16]}
  ({certificate.roots.operations} operations), also for a batch of one and as ONNX
- outputs: bitwise equal logits on {certificate.images} probe images"""


def _parity_lines(parity: ParityReport) -> str:
    state = "passed" if parity.passed else "DID NOT PASS, the drift was allowed"
    top1, limit = parity.top1, parity.floors_allowed
    lines = [f"- {state}: model.onnx in {parity.runtime} ({parity.provider}) against the network in float64"]
    if parity.emulation is not None:
        lines.append(f"- {parity.emulation}")
    for name, output in parity.outputs.items():
        lines.append(
            f"- {name}: max drift {output.largest_drift:.3g} ({output.drift_in_floors:.1f}x "
            f"{parity.precision} noise floor, limit {limit:g}x)"
        )
    lines.append(
        f"- same top class on {top1.agree} of {top1.images} probe images (95 % interval "
        f"{100 * top1.low:.1f} to {100 * top1.high:.1f} %)"
    )
    return "\n".join(lines)


def _precision_lines(report: PrecisionReport) -> str:
    types = ", ".join(f"{count} modules in {name}" for name, count in report.summary().items())
    lines = [f"- {report.precision}: weights of {types}; by module in `precision.json`"]
    if (int8 := report.quantisation) is not None:
        costs = ", ".join(f"{cost.part} ({100 * cost.share:.1f} %)" for cost in int8.costs[:3])
        lines.append(
            f"- {int8.layers} convolutions in int8 {TARGETS[int8.runtime]}, ranges by {int8.calibration} on "
            f"{int8.images} images; largest change of the logits by one layer: {costs}"
        )
    if (found := report.accuracy) is not None:
        text = (
            f"same top class as float32 on {found.agree} of {found.images} images "
            f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %)"
        )
        if found.before is not None and found.after is not None:
            text = f"top-1 {100 * found.before:.2f} % before, {100 * found.after:.2f} % after; {text}"
        lines.append(f"- {text}")
    return "\n".join(lines)
