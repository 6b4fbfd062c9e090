"""The summary that `sopdeploy export` prints: what was removed, proved, rewritten and measured."""

from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sopdeploy.cli.console import out, plain_text
from sopdeploy.environment import SLOW_INT8, lacks_vnni

if TYPE_CHECKING:
    from sopdeploy.decision import Decision
    from sopdeploy_export.parity.report import ClassMapParity
    from sopdeploy_export.pipeline import Exported
    from sopdeploy_export.precision.report import PrecisionReport

MIN_PANEL_WIDTH = 60  # columns
WEAKER_PROOFS = {
    "trained-detached": "no plain network was given; the detached network was compared with the trained one",
    "trained-only": "nothing was detached and no plain network was given: only the conversion was checked",
}


def show(exported: "Exported") -> None:
    """Print the summary: a panel on a terminal, otherwise one line per fact."""
    rows = {name: plain_text(text) for name, text in _facts(exported).items()}
    if out.is_terminal and out.width >= MIN_PANEL_WIDTH:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows.items():
            grid.add_row(name, text)
        title = Text.assemble(("exported", "bold green"), " ", plain_text(exported.manifest.model))
        out.print(Panel(grid, title=title, title_align="left", expand=False), soft_wrap=False)
    else:
        for name, text in rows.items():
            out.print(Text.assemble((f"{name:8}", "bold"), " ", text))
    if exported.parity.drift_allowed:
        out.print("[bold yellow]warning[/]  the numbers drift; the bundle records that this was allowed")
    if exported.manifest.int8_for == "cpu" and lacks_vnni():
        out.print(f"[bold yellow]warning[/]  {SLOW_INT8}")
    for warning in exported.warnings:
        out.print(Text.assemble(("warning", "bold yellow"), "  ", plain_text(warning)))


def _facts(exported: "Exported") -> dict[str, str]:
    certificate, parity, lowering = exported.certificate, exported.parity, exported.lowering
    precisions = ", ".join(f"{count} parts in {name}" for name, count in exported.precision.summary().items())
    rules = ", ".join(f"{name} ({times})" for name, times in lowering.summary.items()) or "none applies"
    trained, shipped = exported.network_summary.trained, exported.network_summary.shipped
    removed = "nothing: the network has no training-only parts"
    if certificate.removed:
        parts, count = ", ".join(certificate.detached), len(certificate.removed)
        removed = f"{parts} ({count} tensors, {certificate.bytes_removed:,} bytes saved)"
    weaker = {}
    if certificate.proof in WEAKER_PROOFS:
        weaker["proof"] = f"{certificate.proof}: {WEAKER_PROOFS[certificate.proof]}"
    return {
        "removed": removed,
        "kept": f"{len(certificate.kept)} tensors, sha256 equal before and after",
        **weaker,
        "graph": f"{' = '.join(certificate.compared)}, root {certificate.roots.any_batch[:16]} "
        f"({certificate.roots.operations} operations; also at batch 1, also as ONNX)",
        "logits": f"bitwise equal on {certificate.images} probe images",
        "rules": rules,
        "types": f"{exported.precision.precision}: {precisions}",
        "drift": f"{parity.logits.largest_drift:.2g} = {parity.logits.drift_in_floors:.1f} noise floors "
        f"(allowed {parity.logits.tolerance:.2g})",
        "answers": _agreement(exported),
        **_precision_costs(exported.precision),
        **_class_maps(parity.class_maps),
        **_decision(exported.manifest.decision),
        "costs": f"{shipped.parameters:,} of {trained.parameters:,} parameters, "
        f"{shipped.macs:,} of {trained.macs:,} multiply-adds per image",
        "onnx": f"{parity.file_bytes:,} bytes, {sum(parity.operators.values())} operators",
        "speed": _speed(exported),
        "bundle": str(exported.path),
        "page": str(exported.path / "report.html"),
    }


def _agreement(exported: "Exported") -> str:
    """Describe how often the top class equals that of the network, and the reasons for differences."""
    top1, routing = exported.parity.top1, exported.parity.routing
    line = (
        f"top class equal on {top1.agree} of {top1.images} probe images ({top1.low:.1%} to {top1.high:.1%})"
    )
    if top1.flipped:
        noise, routed = top1.flips_within_noise, top1.flips_by_routing
        line += f"; flips: {noise} noise, {routed} routing, {top1.flips} wrong"
    return line if routing is None else f"{line}; {routing.flips} routes flipped, {routing.wrong} wrong"


def _precision_costs(precision: "PrecisionReport") -> dict[str, str]:
    """Describe the measured accuracy loss and the attempts to keep it small."""
    rows = {}
    if (accuracy := precision.accuracy) is not None:
        from sopdeploy_export.report.results import describe_top1

        top1, shares = "", (accuracy.before, accuracy.after)
        if accuracy.before is not None and accuracy.after is not None:
            before, after = (describe_top1(share, accuracy.images) for share in shares if share is not None)
            top1 = f"top-1 {before} before, {after} after; "
        rows["images"] = (
            f"{top1}same class as float32 on {accuracy.agree} of {accuracy.images} images "
            f"({accuracy.low:.1%} to {accuracy.high:.1%})"
        )
    if (int8 := precision.quantisation) is not None:
        kept = ", ".join((*int8.kept, *int8.in_float32)) or "none"
        rows["int8"] = f"{int8.layers} layers, ranges by {int8.calibration}; in float32: {kept}"
        if len(int8.tried) > 1:
            rows["tried"] = f"{', '.join(map(str, int8.tried))} points lost"
    return rows


def _class_maps(found: "ClassMapParity | None") -> dict[str, str]:
    """Describe how exactly class activation maps add up to the logits; empty without maps."""
    if found is None:
        return {}
    deviation = f"{found.deviation:.2g} (allowed {found.tolerance:.2g})"
    return {"maps": f"mean of each class activation map + bias = logit, deviation {deviation}"}


def _decision(found: "Decision | None") -> dict[str, str]:
    """Describe the folded temperature and the thresholds; empty without a fitted decision."""
    if found is None:
        return {}
    rows, facts = dict(found.rows()), {}
    if "temperature" in rows:
        facts["scale"] = f"temperature {rows['temperature']}, folded into the last layer"
    elif "calibration error" in rows:
        facts["scale"] = f"calibration error {rows['calibration error']}"
    if "unknown images" in rows:
        auroc = rows.get("AUROC, one class left out")
        facts["unknown"] = rows["unknown images"] + (
            f"; AUROC with one class left out {auroc}" if auroc else ""
        )
    if "thresholds" in rows:
        facts["present"] = f"probability of at least {rows['thresholds']}"
    return facts


def _speed(exported: "Exported") -> str:
    """Describe the latency relative to the plain backbone, or how to measure it."""
    if exported.speed is None:
        return f"not measured: sopdeploy bench {exported.path}, or export with --measure-speed"
    rows = exported.speed.rows
    return "; ".join(
        f"batch {row.batch}: {row.ours_ms:.2f} ms, {row.ratio:.2f} of the plain backbone's time"
        for row in ([rows[0], rows[-1]] if len(rows) > 1 else rows)
    )
