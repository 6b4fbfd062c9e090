"""The screen that an export ends with: what was removed, proved, rewritten and measured."""

from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table

from sopdeploy.cli.console import out, plain

if TYPE_CHECKING:
    from sopdeploy_export.pipeline import Exported
    from sopdeploy_export.precision.report import PrecisionReport

NARROWEST = 60  # columns of a terminal that a frame still helps on


def show(exported: "Exported") -> None:
    """Print one screen: framed on a terminal, a line for each fact elsewhere."""
    rows = {name: plain(text) for name, text in facts(exported).items()}
    if out.is_terminal and out.width >= NARROWEST:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows.items():
            grid.add_row(name, text)
        title = f"[bold green]exported[/] {plain(exported.manifest.model)}"
        out.print(Panel(grid, title=title, title_align="left", expand=False), soft_wrap=False)
    else:
        for name, text in rows.items():
            out.print(f"[bold]{name:8}[/] {text}")
    if exported.parity.drift_allowed:
        out.print("[bold yellow]warning[/]  the numbers drift; the bundle records that this was allowed")


def facts(exported: "Exported") -> dict[str, str]:
    """Return the lines of the screen by their names, in the order of reading."""
    certificate, parity = exported.certificate, exported.parity
    return {
        "removed": f"{', '.join(certificate.detached) or 'nothing'} "
        f"({len(certificate.removed)} tensors, {certificate.bytes_removed:,} bytes saved)",
        "kept": f"{len(certificate.kept)} tensors, sha256 equal before and after",
        "graph": f"trained = detached = plain, root {certificate.roots.any_batch[:16]} "
        f"({certificate.roots.operations} operations; also at batch 1, also as ONNX)",
        "logits": f"bitwise equal on {certificate.images} probe images",
        "rules": rules_line(exported),
        "types": f"{exported.precision.precision}: "
        + ", ".join(f"{count} parts in {name}" for name, count in exported.precision.summary().items()),
        "drift": f"{parity.logits.largest_drift:.2g} = {parity.logits.drift_in_floors:.1f} noise floors "
        f"(allowed {parity.logits.tolerance:.2g})",
        "answers": answers_line(exported),
        **cost_rows(exported.precision),
        "costs": costs_line(exported),
        "onnx": f"{parity.file_bytes:,} bytes, {sum(parity.operators.values())} operators",
        "speed": speed_line(exported),
        "bundle": str(exported.path),
        "page": str(exported.path / "report.html"),
    }


def answers_line(exported: "Exported") -> str:
    """Return how often the top class is the network's, and why it is not."""
    top1, routing = exported.parity.top1, exported.parity.routing
    flips = f"; flips: {top1.flips_within_noise} noise, {top1.flips_by_routing} routing, {top1.flips} wrong"
    line = (
        f"top class equal on {top1.agree} of {top1.images} probe images ({top1.low:.1%} to {top1.high:.1%})"
        f"{flips if top1.flipped else ''}"
    )
    return line if routing is None else f"{line}; {routing.flips} routes flipped, {routing.wrong} wrong"


def cost_rows(precision: "PrecisionReport") -> dict[str, str]:
    """Return what the precision costs in answers, and the dearest layers, where it was measured."""
    rows = {}
    if precision.accuracy is not None:
        found = precision.accuracy
        top1 = "" if found.before is None else f"top-1 {found.before:.2%} before, {found.after:.2%} after; "
        rows["pictures"] = (
            f"{top1}as float32 on {found.agree} of {found.images} pictures "
            f"({found.low:.1%} to {found.high:.1%})"
        )
    if precision.quantisation is not None:
        costs = ", ".join(f"{cost.part} {cost.share:.1%}" for cost in precision.quantisation.costs[:3])
        rows["dearest"] = costs or "no layer moves the logits"
    return rows


def rules_line(exported: "Exported") -> str:
    """Return which rules were applied, how often, and which forms were chosen."""
    report = exported.lowering
    rules = ", ".join(f"{name} ({times})" for name, times in report.summary.items()) or "none applies"
    forms = "; ".join(f"{choice.where}: {choice.form} ({choice.by})" for choice in report.choices)
    return f"{rules}; {forms}" if forms else rules


def costs_line(exported: "Exported") -> str:
    """Return parameters and multiply-adds of what trained and of what ships."""
    trained, shipped = exported.network_summary.trained, exported.network_summary.shipped
    return (
        f"{shipped.parameters:,} of {trained.parameters:,} parameters, "
        f"{shipped.macs:,} of {trained.macs:,} multiply-adds an image"
    )


def speed_line(exported: "Exported") -> str:
    """Return the file's time over that of the plain backbone; without a measurement the way to one."""
    if exported.speed is None:
        return f"not measured: sopdeploy bench {exported.path}, or export with --measure-speed"
    rows = exported.speed.rows
    shown = [rows[0], rows[-1]] if len(rows) > 1 else [rows[0]]
    return "; ".join(
        f"batch {row.batch}: {row.ours_ms:.2f} ms, {row.ratio:.2f} of the plain backbone's time"
        for row in shown
    )
