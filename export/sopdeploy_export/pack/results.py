"""What an export proved and measured, in words for terminals and model cards."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sopdeploy.bundle.manifest import Int8For, Manifest, describe_temperature
from sopdeploy.bundle.second_order import NOTHING, SecondOrder
from sopdeploy.decision import Decision
from sopdeploy.errors import shorten
from sopdeploy.models.describe import Counts
from sopdeploy_export.lower.precision import Accuracy, PrecisionReport
from sopdeploy_export.prove.certificate import Certificate
from sopdeploy_export.prove.file import ParityReport

SHOWS_ONE_POINT = 381  # images: if all agree, the 95 % interval of the agreement begins at 99 %
WEAKER_PROOFS = {
    "trained-detached": "no plain network was given; the detached network was compared with the trained one",
    "trained-only": "nothing was detached and no plain network was given: only the conversion was checked",
    "trained-detached-rebuilt": "no plain network was given; the detached network was compared with the "
    "trained one, and with a new one of the same builder with its weights",
    "trained-rebuilt": "no plain network was given; the trained network was compared with a new one of the "
    "same builder with its weights",
}
TARGETS: Mapping[Int8For, str] = {
    "cpu": "for CPUs (TensorRT does not accept this form)",
    "tensorrt": "for TensorRT (CPUs run this form slower than float32)",
}


@dataclass(frozen=True, kw_only=True)
class ExportResults:
    """What an export removed, proved and measured; `network` names the network that ships."""

    network: str
    certificate: Certificate
    parity: ParityReport
    precision: PrecisionReport
    trained: Counts
    shipped: Counts
    second_order: SecondOrder
    decision: Decision | None

    def facts(self) -> dict[str, str]:
        """Describe each result on one line, by a short name such as `types`."""
        parity = self.parity
        parts_by_type = sorted(Counter(self.precision.parts.values()).items())
        types = ", ".join(f"{count} parts in {name}" for name, count in parts_by_type)

        # The numerical error against float64; then on how many images the top class is the same.
        error = (
            f"{parity.logits.largest_drift:.2g} from float64: "
            f"{parity.logits.drift_in_floors:.1f} times the network's rounding error (limit "
            f"{parity.floors_allowed:g})"
        )
        if not parity.passed:
            error += "; THE COMPARISON DID NOT PASS, which was allowed"

        top_class = f"equal on {parity.num_agreeing} of {parity.num_images} reference images"
        if parity.num_agreeing < parity.num_images:
            flips = parity.flips
            top_class += (
                f"; changed by rounding: {flips['noise']}, by another route: {flips['routing']}, "
                f"wrongly: {flips['error']}"
            )
        if parity.routing is not None:
            top_class += f"; the gate is undecided on {parity.routing.num_undecided}"
        return {
            **_proof_facts(self.certificate),
            "removed": self._describe_removed(),
            "lowered": self.second_order.describe() or NOTHING,
            "types": f"{self.precision.precision}: {types}",
            "numerical error": error,
            "top class": top_class,
            **_precision_facts(self.precision),
            **self._logits_fact(),
            **dict(() if self.decision is None else self.decision.rows()),
            "costs": f"{self.shipped.parameters:,} of {self.trained.parameters:,} parameters, "
            f"{self.shipped.macs:,} of {self.trained.macs:,} multiply-adds per image",
            "onnx": f"{parity.file_bytes:,} bytes, {sum(parity.operators.values())} operators",
        }

    def _logits_fact(self) -> dict[str, str]:
        """Say what the temperature divided, if there is one."""
        described = describe_temperature(self.decision, self.certificate.temperature_scaling)
        return {"logits": described} if described else {}

    def _describe_removed(self) -> str:
        """Describe the removed parts with their tensors, parameters and multiply-adds."""
        described = _describe_removed(self.certificate)
        if not self.certificate.detached:
            return described

        counts = [
            (self.trained.parameters - self.shipped.parameters, "parameters"),
            (self.trained.macs - self.shipped.macs, "multiply-adds per image"),
        ]
        saved = [f"{count:,} {what}" for count, what in counts if count > 0]
        return "; ".join([described, ", ".join(saved)]) if saved else described


@dataclass(frozen=True, kw_only=True)
class Exported(ExportResults):
    """The bundle that an export wrote, its results, its time in seconds, and the page about it."""

    path: Path
    page: Path | None = None
    manifest: Manifest
    warnings: tuple[str, ...] = ()
    seconds: float

    def lines(self) -> dict[str, str]:
        """Return the four to six lines that `sopdeploy export` prints, by their labels.

        Each joins some of the `facts`. The fifth is about second-order parts, and the sixth about the
        temperature, if there are any.
        """
        facts = self.facts()
        certificate = self.certificate

        # The compared networks, what their comparison lacks, and whether images are independent.
        proof_parts = []
        if len(certificate.compared) > 1:
            proof_parts.append(f"{certificate.describe_compared()}: equal graphs")
        if certificate.proof in WEAKER_PROOFS:
            proof_parts.append(WEAKER_PROOFS[certificate.proof])
        proof_parts.append(facts["batch"])
        proof = "; ".join(proof_parts)

        measured = ("numerical error", "images")
        numerics = "; ".join(facts[name] for name in measured if name in facts)
        bundle = f"{self.path} ({self.seconds:.0f} s; README.md describes it)"
        lines = {"removed": facts["removed"]}
        if self.second_order.describe():  # a first-order network has no such line
            lines["lowered"] = facts["lowered"]
        return {
            **lines,
            "proof": proof,
            "numerics": numerics,
            **self._logits_fact(),
            "bundle": bundle,
        }

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


def _proof_facts(certificate: Certificate) -> dict[str, str]:
    """Describe what was removed, kept and proved."""
    # `kept` has only the tensors that the outputs depend on; the unreached ones stayed, too.
    num_needed = len(certificate.kept)
    num_kept = num_needed + len(certificate.unreached)
    facts = {
        "removed": _describe_removed(certificate),
        "kept": f"{num_kept} tensors; the outputs depend on {num_needed}",
    }
    if certificate.proof in WEAKER_PROOFS:
        facts["proof"] = f"{certificate.proof}: {WEAKER_PROOFS[certificate.proof]}"

    roots = certificate.roots
    facts["graph"] = (
        f"{certificate.describe_compared()}, hash {roots.any_batch[:16]} ({roots.num_operations} operations)"
    )
    sizes = ", ".join(map(str, certificate.batches))
    facts["plain run"] = (
        f"the outputs of the graph, except for rounding, in batches of {sizes} images (measured)"
    )

    facts["batch"] = "no output changed with other images (measured)"
    if certificate.mixes_images:
        outputs = ", ".join(certificate.mixes_images)
        facts["batch"] = f"these outputs change with the other images of a batch: {outputs}"
    return facts


def _describe_removed(certificate: Certificate) -> str:
    """Describe the removed parts; if there are none, name tensors that could be removed, if there are any."""
    if certificate.detached:
        tensors = (
            f"{len(certificate.removed)} tensors, {certificate.bytes_removed:,} bytes saved"
        )
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
        return "nothing: this network has no auxiliary branches"
    names = shorten([tensor.name for tensor in unused])
    size = sum(tensor.bytes for tensor in unused)
    return f"nothing, although the outputs do not depend on {names} ({size:,} bytes), which was not named"


def _precision_facts(precision: PrecisionReport) -> dict[str, str]:
    """Describe the measured accuracy loss and the quantization, if there are any."""
    facts: dict[str, str] = {}
    if precision.accuracy is not None:
        facts["images"] = _describe_accuracy(precision.accuracy)

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
