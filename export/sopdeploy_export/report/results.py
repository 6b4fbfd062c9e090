"""The results of an export, and their description in words for terminals and model cards."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sopdeploy.bundle.manifest import Int8For, Manifest
from sopdeploy.decision import Decision
from sopdeploy.models.describe import Counts
from sopdeploy_export.findings import ParityReport, PrecisionReport
from sopdeploy_export.proof.certificate import Certificate

SHOWS_ONE_POINT = 381  # images: if all agree, the 95 % interval of the agreement begins at 99 %
WEAKER_PROOFS = {
    "trained-detached": "no plain network was given; the detached network was compared with the trained one",
    "trained-only": "nothing was detached and no plain network was given: only the conversion was checked",
}
TARGETS: Mapping[Int8For, str] = {
    "cpu": "for CPUs (TensorRT does not accept this form)",
    "tensorrt": "for TensorRT (CPUs run this form slower than float32)",
}


@dataclass(frozen=True, kw_only=True)
class ExportResults:
    """What an export removed, proved and measured."""

    certificate: Certificate
    parity: ParityReport
    precision: PrecisionReport
    trained: Counts
    shipped: Counts
    decision: Decision | None

    def facts(self) -> dict[str, str]:
        """Describe the results, one line for each."""
        certificate, parity = self.certificate, self.parity
        parts_by_type = sorted(Counter(self.precision.parts.values()).items())
        types = ", ".join(f"{count} parts in {name}" for name, count in parts_by_type)
        drift = (
            f"{parity.logits.largest_drift:.2g} = {parity.logits.drift_in_floors:.1f} noise floors "
            f"(limit {parity.floors_allowed:g})"
        )
        if not parity.passed:
            drift += "; THE COMPARISON DID NOT PASS, which was allowed"
        return {
            **_proof_facts(certificate),
            "types": f"{self.precision.precision}: {types}",
            "drift": drift,
            "answers": _agreement(parity),
            **_precision_facts(self.precision),
            **_decision_facts(self.decision),
            "costs": f"{self.shipped.parameters:,} of {self.trained.parameters:,} parameters, "
            f"{self.shipped.macs:,} of {self.trained.macs:,} multiply-adds per image",
            "onnx": f"{parity.file_bytes:,} bytes, {sum(parity.operators.values())} operators",
        }


@dataclass(frozen=True, kw_only=True)
class Exported(ExportResults):
    """The bundle that an export wrote, its results and its time in seconds."""

    path: Path
    manifest: Manifest
    warnings: tuple[str, ...] = ()
    seconds: float

    def lines(self) -> dict[str, str]:
        """Describe the export in four lines: what was removed, the proof, the drift, the bundle."""
        facts, certificate = self.facts(), self.certificate
        compared = " = ".join(certificate.compared)
        proof = f"{compared}: equal graphs, equal logits" if len(certificate.compared) > 1 else ""
        proof = "; ".join(filter(None, (proof, WEAKER_PROOFS.get(certificate.proof), facts["batch"])))
        drift = "; ".join(facts[name] for name in ("drift", "images") if name in facts)
        bundle = f"{self.path} ({self.seconds:.0f} s; report.html describes it)"
        return {"removed": facts["removed"], "proof": proof, "drift": drift, "bundle": bundle}

    def summary(self) -> dict[str, Any]:
        """Build the output of `export --json`, with a decision if there is one."""
        return {
            "bundle": str(self.path),
            "id": self.manifest.id,
            "project": self.manifest.project,
            "model": self.manifest.model,
            "proof": self.certificate.proof,
            "detached": list(self.certificate.detached),
            "num_tensors_removed": len(self.certificate.removed),
            "bytes_removed": self.certificate.bytes_removed,
            "num_tensors_kept": len(self.certificate.kept),
            "roots": self.certificate.roots.model_dump(),
            "parity": self.parity.model_dump(),
            "precision": self.precision.model_dump(),
            **({} if self.decision is None else {"decision": self.decision.model_dump(mode="json")}),
            "trained": self.trained.model_dump(),
            "shipped": self.shipped.model_dump(),
            "warnings": list(self.warnings),
        }


def _proof_facts(certificate: Certificate) -> dict[str, str]:
    removed = "nothing: the network has no training-only parts"
    if certificate.removed:
        tensors = f"{len(certificate.removed)} tensors, {certificate.bytes_removed:,} bytes saved"
        removed = f"{', '.join(certificate.detached)} ({tensors})"
    weaker = {}
    if certificate.proof in WEAKER_PROOFS:
        weaker["proof"] = f"{certificate.proof}: {WEAKER_PROOFS[certificate.proof]}"
    return {
        "removed": removed,
        "kept": f"{len(certificate.kept)} tensors, sha256 equal before and after",
        **weaker,
        "graph": f"{' = '.join(certificate.compared)}, root {certificate.roots.any_batch[:16]} "
        f"({certificate.roots.num_operations} operations; also at batch 1, also as ONNX)",
        "logits": f"bitwise equal on {certificate.num_images} probe images",
        "batch": f"outputs may depend on other images: {', '.join(certificate.mixes_images)}"
        if certificate.mixes_images
        else "no output depends on other images",
    }


def _agreement(parity: ParityReport) -> str:
    """Describe how often the top class equals that of the network, and the reasons for differences."""
    line = f"top class equal on {parity.num_agreeing} of {parity.num_images} probe images"
    if parity.num_agreeing < parity.num_images:
        flips = parity.flips
        line += f"; flips: {flips['noise']} noise, {flips['routing']} routing, {flips['error']} wrong"
    if (routing := parity.routing) is not None:
        line += f"; {routing.num_flips} routes flipped, {routing.num_wrong} wrong"
    return line


def _precision_facts(precision: PrecisionReport) -> dict[str, str]:
    """Describe the measured accuracy loss and the attempts to keep it small."""
    rows = {}
    if (accuracy := precision.accuracy) is not None:
        top1 = ""
        if accuracy.before is not None and accuracy.after is not None:
            before, after = (_top1(share, accuracy.num_images) for share in (accuracy.before, accuracy.after))
            top1 = f"top-1 {before} before, {after} after; "
        rows["images"] = (
            f"{top1}same class as float32 on {accuracy.num_agreeing} of {accuracy.num_images} images "
            f"({accuracy.low:.1%} to {accuracy.high:.1%})"
        )
        if accuracy.num_images < SHOWS_ONE_POINT:
            rows["images"] += f"; too few to show a loss of one point, which needs {SHOWS_ONE_POINT}"
    if (int8 := precision.quantisation) is not None:
        kept = ", ".join(int8.in_float32) or "none"
        rows["int8"] = (
            f"{int8.num_layers} layers {TARGETS[int8.runtime]}, ranges of {int8.num_images} images; "
            f"in float32: {kept}"
        )
        if len(int8.tried) > 1:
            rows["tried"] = f"{', '.join(map(str, int8.tried))} points lost"
    return rows


def _top1(share: float, images: int) -> str:
    from sopdeploy.evaluation.statistics import wilson  # noqa: PLC0415 # only with --evaluate

    low, high = wilson(round(share * images), images)
    return f"{100 * share:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


def _decision_facts(decision: Decision | None) -> dict[str, str]:
    """Describe the folded temperature and the thresholds; empty without a fitted decision."""
    rows, facts = dict(decision.rows() if decision is not None else ()), {}
    if "temperature" in rows:
        facts["scale"] = f"temperature {rows['temperature']}, folded into the last layer"
    elif "log loss" in rows:
        facts["scale"] = f"log loss {rows['log loss']}"
    if "unknown images" in rows:
        facts["unknown"] = "; rejects ".join(
            rows[name] for name in ("unknown images", "rejects") if name in rows
        )
    if "thresholds" in rows:
        facts["present"] = f"probability of at least {rows['thresholds']}"
    return facts
