"""The page of a bundle that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from sopdeploy.bundle.manifest import Int8For, TensorRecord
from sopdeploy.checkpoint import Checkpoint
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.precision.report import Accuracy, PrecisionReport
from sopdeploy_export.proof.certificate import Certificate

LABELS_SHOWN = 20
MADE_FOR: Mapping[Int8For, str] = {
    "cpu": "for a CPU (TensorRT does not take this form)",
    "tensorrt": "for TensorRT (a CPU runs this form slower than float32)",
}


def render(
    checkpoint: Checkpoint,
    certificate: Certificate,
    parity: ParityReport,
    precision: PrecisionReport,
    fields: Mapping[str, Any],
) -> str:
    """Return the model card as Markdown; *fields* are those of the manifest."""
    rules = checkpoint.preprocess
    labels = ", ".join(checkpoint.labels[:LABELS_SHOWN])
    if len(checkpoint.labels) > LABELS_SHOWN:
        labels += f", ... ({len(checkpoint.labels)} in all, see labels.json)"
    return f"""# {checkpoint.model}

An image classifier exported by sopdeploy {fields["versions"]["sopdeploy"]}.

Classes: {labels}

## Use

    sopdeploy verify .
    sopdeploy predict . photo.jpg
    sopdeploy serve .

## Input and output

`{fields["inputs"][0].name}`: uint8, (batch, {rules.crop}, {rules.crop}, 3), RGB. The shorter side of
a picture is resized to {rules.resize} pixels ({rules.interpolation}), then the centre is cropped;
mean and standard deviation are inside the graph. Batches of {fields["batch"].minimum} to
{fields["batch"].maximum} images. {output_words(fields["outputs"])}

## Training

{training_lines(checkpoint)}

## What was proved

{proof_lines(certificate)}

## What was measured

{parity_lines(parity)}

## Precision

{precision_lines(precision)}
"""


def output_words(outputs: Sequence[TensorRecord]) -> str:
    """Return names, types and shapes of the outputs."""
    return ", ".join(
        f"`{output.name}`: {output.dtype}, (batch, {', '.join(str(size) for size in output.shape[1:])})"
        for output in outputs
    )


def training_lines(checkpoint: Checkpoint) -> str:
    """Return what the checkpoint says of its training: plain figures only."""
    plain = {
        key: value
        for key, value in checkpoint.training.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    }
    return "\n".join(f"- {key}: {value}" for key, value in sorted(plain.items())) or "Not recorded."


def proof_lines(certificate: Certificate) -> str:
    """Return the certificate in words."""
    removed = (
        f"- removed: {', '.join(certificate.detached)} ({len(certificate.removed)} tensors, "
        f"{certificate.bytes_removed} bytes)"
        if certificate.removed
        else "- removed: nothing, all of the network computes the answer"
    )
    return f"""{removed}
- kept: {len(certificate.kept)} tensors, each with the same sha256 before and after
- one graph: trained, detached and plain network share the root {certificate.roots.any_batch[:16]}
  ({certificate.roots.operations} operations), also for a batch of one and after lowering to ONNX
- one answer: bitwise equal logits on {certificate.images} probe images"""


def drift_lines(parity: ParityReport) -> str:
    """Return a line per output."""
    return "\n".join(
        f"- {name}: largest drift {output.largest_drift:.3g}, {output.drift_in_floors:.1f} times the "
        f"network's own {parity.precision} noise ({output.noise_floor:.3g}); allowed {output.tolerance:.3g}"
        for name, output in parity.outputs.items()
    )


def parity_lines(parity: ParityReport) -> str:
    """Return the parity report in words."""
    state = "passed" if parity.passed else "DID NOT PASS, drift was allowed"
    emulated = "" if parity.emulation is None else f"\n- {parity.emulation}"
    where = f"{parity.runtime} ({parity.provider})"
    return f"""- {state}: model.onnx in {where} against the network in float64{emulated}
{drift_lines(parity)}
- top class agrees on {parity.top1.agree} of {parity.top1.images} probe images (95 % interval \
{100 * parity.top1.low:.1f} to {100 * parity.top1.high:.1f} %)"""


def precision_lines(report: PrecisionReport) -> str:
    """Return types of the parts, and what they cost, in words."""
    types = ", ".join(f"{count} parts in {name}" for name, count in report.summary().items())
    lines = [f"- {report.precision}: weights of {types}; part by part in `precision.json`"]
    if report.quantisation is not None:
        found = report.quantisation
        dear = ", ".join(f"{cost.part} ({100 * cost.share:.1f} %)" for cost in found.costs[:3])
        lines.append(
            f"- {found.layers} convolutions in int8 {MADE_FOR[found.runtime]}, ranges by "
            f"{found.calibration} on {found.images} pictures; alone they move the logits most: {dear}"
        )
    if report.accuracy is not None:
        lines.append(f"- {accuracy_words(report.accuracy)}")
    return "\n".join(lines)


def accuracy_words(found: Accuracy) -> str:
    """Return what the precision costs in answers, in words."""
    words = (
        f"same top class as float32 on {found.agree} of {found.images} pictures "
        f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %)"
    )
    if found.before is None or found.after is None:
        return words
    return f"top-1 {100 * found.before:.2f} % before, {100 * found.after:.2f} % after; {words}"
