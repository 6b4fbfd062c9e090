"""What an export proved and measured, in words for terminals and model cards."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.manifest import Int8For, Manifest, ProofKind, describe_temperature
from sopdeploy.bundle.second_order import NOTHING, SecondOrder
from sopdeploy.bundle.statements import Evidence
from sopdeploy.errors import shorten
from sopdeploy.models.describe import Counts
from sopdeploy_export.lower.precision import Accuracy, PrecisionReport
from sopdeploy_export.prove.certificate import Certificate
from sopdeploy_export.prove.file import ParityReport

SHOWS_ONE_POINT = 381  # images: if all agree, the 95 % interval of the agreement begins at 99 %
# What the comparison of graphs showed, by the networks that it compared.
GRAPHS: Mapping[ProofKind, str] = {
    "three-way": "a network that is built without the removed parts has the same graph",
    "trained-detached-rebuilt": "without the removed parts, the graph stays the same, also in a second "
    "network of the same builder; no plain network was given",
    "trained-detached": "without the removed parts, the graph stays the same; no plain network was given",
    "trained-plain": "a newly built plain network has the same graph",
    "trained-rebuilt": "a second network of the same builder has the same graph; no plain network was given",
    "trained-only": "no other graph to compare: nothing was removed and no plain network was given",
}
TARGETS: Mapping[Int8For, str] = {
    "cpu": "for CPUs (TensorRT does not accept this form)",
    "tensorrt": "for TensorRT (CPUs run this form slower than float32)",
}


class Check(NamedTuple):
    """A statement of the certificate, what it says about this network, and whether it holds.

    `holds` is None if there was nothing to check, and False if a difference was allowed.
    """

    statement: str
    evidence: Evidence
    text: str
    holds: bool | None = True


@dataclass(frozen=True, kw_only=True)
class ExportResults:
    """What an export removed, proved and measured.

    `network` names the network that was exported with its options, and `headline` says in a few words
    what it is.
    """

    network: str
    headline: str
    certificate: Certificate
    parity: ParityReport
    precision: PrecisionReport
    trained: Counts
    shipped: Counts
    second_order: SecondOrder
    decision: Decision | None

    def checks(self) -> tuple[Check, ...]:
        """Describe each statement of the certificate on one line."""
        certificate = self.certificate
        evidence = certificate.statements

        removed = f"no output depends on the removed parts: {_describe_removed(certificate)}"
        if not certificate.detached:
            removed = _describe_removed(certificate)
        has_second_graph = len(certificate.compared) > 1

        *sizes, largest = map(str, certificate.batches)
        batches = f"{', '.join(sizes)} and {largest} images" if sizes else f"{largest} image"
        plain_run = (
            f"the network's code and its graph give the same outputs, in batches of {batches}"
        )

        images = "outputs do not depend on the other images of the batch"
        if certificate.mixes_images:
            outputs = ", ".join(certificate.mixes_images)
            images = (
                f"outputs depend on the other images of the batch, which was allowed: {outputs}"
            )

        file = f"model.onnx gives the same outputs: largest error {self._describe_error()}"
        if not self.parity.passed:
            file = f"model.onnx gives other outputs, which was allowed: largest error {self._describe_error()}"

        pixels = certificate.pixels
        is_same: bool | None = None
        same = "not compared with the pixels of the training, because --transform was not given"
        if pixels is not None:
            is_same = not pixels.differences
            same = pixels.describe()

        is_removed = True if certificate.detached else None
        return (
            Check("Pixels", evidence["Pixels"], same, is_same),
            Check("Removed", evidence["Removed"], removed, is_removed),
            Check(
                "Graph",
                evidence["Graph"],
                GRAPHS[certificate.proof],
                True if has_second_graph else None,
            ),
            Check("Plain run", evidence["Plain run"], plain_run),
            Check("Images", evidence["Images"], images, not certificate.mixes_images),
            Check("File", evidence["File"], file, self.parity.passed),
        )

    def _describe_error(self) -> str:
        """Describe the numerical error of the logits of `model.onnx` against float64, and its limit."""
        logits = self.parity.logits
        return (
            f"{logits.largest_drift:.2g}, {logits.drift_in_floors:.1f} times PyTorch's own error in "
            f"{self.parity.precision} (limit {self.parity.floors_allowed:g})"
        )

    def sizes(self) -> dict[str, str]:
        """Return megabytes, parameters and multiply-adds before and after the export, by unit."""
        certificate = self.certificate
        tensors = (*certificate.removed, *certificate.kept, *certificate.unreached)
        trained_bytes = sum(tensor.bytes for tensor in tensors)
        return {
            "MB": _change(_in_millions(trained_bytes), _in_millions(self.parity.file_bytes)),
            "parameters": _change(
                f"{self.trained.parameters:,}", f"{self.shipped.parameters:,}"
            ),
            "million multiply-adds per image": _change(
                _in_millions(self.trained.macs), _in_millions(self.shipped.macs)
            ),
        }

    def size(self) -> str:
        """Describe size, parameters and multiply-adds before and after the export on one line."""
        return ", ".join(f"{change} {unit}" for unit, change in self.sizes().items())

    def facts(self) -> dict[str, str]:
        """Describe each result on one line, by a short name such as `types`."""
        parity = self.parity
        parts_by_type = sorted(Counter(self.precision.parts.values()).items())
        types = ", ".join(f"{count} parts in {name}" for name, count in parts_by_type)

        # On how many images the top class is the same, and why it changed on the others.
        top_class = f"equal on {parity.num_agreeing} of {parity.num_images} reference images"
        if parity.num_agreeing < parity.num_images:
            flips = parity.flips
            top_class += (
                f"; changed by rounding: {flips['noise']}, by another choice of the gate: {flips['routing']}, "
                f"wrongly: {flips['error']}"
            )
        if parity.routing is not None:
            top_class += f"; the gate is undecided on {parity.routing.num_undecided}"
        return {
            "configuration": self.network,
            "removed": _describe_removed(self.certificate),
            **_graph_facts(self.certificate),
            "computes": self.second_order.describe() or NOTHING,
            "types": f"{self.precision.precision}: {types}",
            "numerical error": self._describe_error(),
            "top class": top_class,
            **_precision_facts(self.precision),
            **self._logits_fact(),
            "size": self.size(),
            "onnx": f"{parity.file_bytes:,} bytes, {sum(parity.operators.values())} operators",
        }

    def notable_facts(self) -> dict[str, str]:
        """Return the facts that not every export has: second-order parts, accuracy, a temperature."""
        second_order = self.second_order.describe()
        return {
            **({"computes": second_order} if second_order else {}),
            **_precision_facts(self.precision),
            **self._logits_fact(),
        }

    def _logits_fact(self) -> dict[str, str]:
        """Say what the temperature divided, if there is one."""
        described = describe_temperature(self.decision, self.certificate.temperature_scaling)
        return {"logits": described} if described else {}


@dataclass(frozen=True, kw_only=True)
class Exported(ExportResults):
    """The bundle that an export wrote, its results, its time in seconds, and the page about it."""

    path: Path
    page: Path | None = None
    manifest: Manifest
    warnings: tuple[str, ...] = ()
    seconds: float

    def summary(self) -> dict[str, object]:
        """Build the output of `export --json`, with a decision if there is one."""
        decision: dict[str, object] = {}
        if self.decision is not None:
            decision = {"decision": self.decision.model_dump(mode="json")}

        return {
            "bundle": str(self.path),
            "id": self.manifest.id,
            "project": self.manifest.project,
            "model": self.manifest.model,
            "network": self.network,
            **self.certificate.model_dump(
                include={"proof", "detached", "roots", "temperature_scaling"}
            ),
            "num_tensors_removed": len(self.certificate.removed),
            "bytes_removed": self.certificate.bytes_removed,
            "num_tensors_kept": len(self.certificate.kept),
            "num_tensors_unreached": len(self.certificate.unreached),
            "parity": self.parity.model_dump(),
            "precision": self.precision.model_dump(),
            **decision,
            "second_order": asdict(self.second_order),
            "trained": self.trained.model_dump(),
            "shipped": self.shipped.model_dump(),
            "warnings": list(self.warnings),
        }


def _change(before: str, after: str) -> str:
    """Write two numbers, or one of them if they are equal."""
    return before if before == after else f"{before} -> {after}"


def _in_millions(count: int) -> str:
    """Write *count* in millions, with three digits or more."""
    millions = count / 1e6
    return f"{millions:,.0f}" if millions >= 100 else f"{millions:.3g}"


def _graph_facts(certificate: Certificate) -> dict[str, str]:
    """Describe what was kept, and which graphs were compared."""
    # `kept` has only the tensors that the outputs depend on; the unreached ones stayed, too.
    num_needed = len(certificate.kept)
    num_kept = num_needed + len(certificate.unreached)
    roots = certificate.roots
    return {
        "kept": f"{num_kept} tensors; the outputs depend on {num_needed}",
        "proof": certificate.proof,
        "graph": f"{certificate.describe_compared()}, hash {roots.any_batch[:16]} "
        f"({roots.num_operations} operations)",
    }


def _describe_removed(certificate: Certificate) -> str:
    """Describe the removed parts; if there are none, name tensors that could be removed, if there are any."""
    if certificate.detached:
        tensors = f"{len(certificate.removed)} tensors, {certificate.bytes_removed:,} bytes"
        return f"{', '.join(certificate.detached)} ({tensors})"

    # The tensors that no output depends on, without counters, such as `num_batches_tracked`, of
    # modules that are used.
    used_modules = {tensor.name.rpartition(".")[0] for tensor in certificate.kept}
    unused = [
        tensor
        for tensor in certificate.unreached
        if tensor.dtype.startswith("float")
        or tensor.name.rpartition(".")[0] not in used_modules
    ]
    if not unused:
        return "nothing was removed: this network has no auxiliary branches"
    names = shorten([tensor.name for tensor in unused])
    size = sum(tensor.bytes for tensor in unused)
    return f"nothing was removed, although no output depends on {names} ({size:,} bytes): not named as training-only"


def _precision_facts(precision: PrecisionReport) -> dict[str, str]:
    """Describe the measured accuracy loss and the quantization, if there are any."""
    facts: dict[str, str] = {}
    if precision.accuracy is not None:
        facts["accuracy"] = _describe_accuracy(precision.accuracy)

    int8 = precision.quantisation
    if int8 is not None:
        layers = f"{int8.num_layers} layers {TARGETS[int8.runtime]}"
        facts["int8"] = f"{layers}, ranges of {int8.num_images} images"
    return facts


def _describe_accuracy(accuracy: Accuracy) -> str:
    """Describe the measured accuracy: top-1 if there were labels, agreement, and the change of the logits."""
    count = accuracy.num_images
    text = ""
    if accuracy.before is not None and accuracy.after is not None:
        before = _share(round(accuracy.before * count), count)
        after = _share(round(accuracy.after * count), count)
        text = f"top-1 {before} before, {after} after; "

    text += f"same class as float32 on {_share(accuracy.num_agreeing, count)}"
    text += f"; logits differ by {accuracy.deviation:.2g} standard deviations"
    if count < SHOWS_ONE_POINT:
        text += f"; too few to show a loss of one point, which needs {SHOWS_ONE_POINT}"
    return text


def _share(count: int, images: int) -> str:
    """Write "*count* of *images* images" and the 95 % interval of this share."""
    from sopdeploy.evaluation.metrics import wilson  # noqa: PLC0415 # only with photographs

    low, high = wilson(count, images)
    return f"{count} of {images} images (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
