"""The page of a reproduced table: printed figures beside measured ones, curves, commands."""

from collections.abc import Sequence

from sopdeploy.html.templates import render
from sopdeploy.reproduction.figures import curve_charts, row_charts, table_charts
from sopdeploy.reproduction.plan import ReproducedRow, Reproduction
from sopdeploy.reproduction.results import MeanError
from sopdeploy.training.diagnostics import median_throughput

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]  # column names and rows

COUNTS = {  # names of the counts of a row
    "params": "parameters (M)",
    "train_params": "parameters in training (M)",
    "gflops": "GFLOPs",
    "train_gflops": "GFLOPs in training",
    "dim": "classified vector",
}


def render_page(results: Reproduction) -> str:
    """Render the page as HTML; the same results always give the same text."""
    finished = [row for row in results.rows if row.runs]
    return render(
        "sopdeploy.reproduction",
        "table.html",
        results=results,
        table=results.table,
        row_notes=[(row.printed.name, row.printed.note) for row in results.rows if row.printed.note],
        interval=f"95 % interval over {'seeds (Student)' if results.seeds > 1 else 'images (Wilson)'}",
        first=finished[0].runs[0] if finished else None,
        errors=error_table(results.rows),
        branches=_branch_table(finished),
        facts=fact_table(results.rows),
        runs=_run_table(finished),
        curves=curve_charts(finished),
        charts=[*table_charts(results.table, results.rows), *row_charts(finished)],
        commands=[(row.printed.name, row.command(results.folder, 0)) for row in results.rows if row.recipe],
    )


def error_table(rows: Sequence[ReproducedRow]) -> Table:
    """Format the printed and the measured errors of *rows*, in percent."""
    lines = [
        (
            f"{row.printed.name}{' (cited)' if row.printed.cited else ''}",
            _printed_error(row.printed.top1),
            _measured_error(row.top1),
            _printed_error(row.printed.top5),
            _measured_error(row.top5),
            row.status,
        )
        for row in rows
        if not row.printed.teacher
    ]
    return ("row", "top-1 printed", "measured", "top-5 printed", "measured", "status"), lines


def fact_table(rows: Sequence[ReproducedRow]) -> Table:
    """Format the printed counts and facts of *rows*, each beside the one that was counted or measured."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        unit = " x ResNet-50" if row.printed.times else ""  # some papers print multiples
        for key, name in COUNTS.items():
            printed = getattr(row.printed, key)
            if printed is not None and key in row.counts:
                lines.append((row.printed.name, name, f"{number(printed)}{unit}", number(row.counts[key])))
        for name in dict.fromkeys((*row.printed.facts, *row.facts)):
            figures = (facts.get(name) for facts in (row.printed.facts, row.facts))
            cells = ("" if figure is None else number(figure) for figure in figures)
            lines.append((row.printed.name, name, *cells))
    return ("row", "figure", "printed", "counted or measured"), lines


def _branch_table(rows: Sequence[ReproducedRow]) -> Table:
    """Format printed and measured errors of the branches, averaged over seeds."""
    lines = []
    for row in rows:
        for name in row.runs[0].heads:
            if name == "main":
                continue
            stage = name.partition("_")[0]  # a branch is named after its stage and block
            printed_top1, printed_top5 = row.printed.heads.get(stage, (None, None))
            heads = [run.heads[name] for run in row.runs]
            top1 = 100 * sum(head.top1 for head in heads) / len(heads)
            top5 = 100 * sum(head.top5 for head in heads) / len(heads)
            cells = _printed_error(printed_top1), f"{top1:.2f}", _printed_error(printed_top5), f"{top5:.2f}"
            constant = " (the same logits for every image)" if any(head.constant for head in heads) else ""
            lines.append((f"{row.printed.name}, {name}{constant}", *cells))
    return ("branch", "top-1 printed", "measured", "top-5 printed", "measured"), lines


def _run_table(rows: Sequence[ReproducedRow]) -> Table:
    """Format the networks that were trained, and the speed of their training."""
    lines = []
    for row in rows:
        run, printed_speed = row.runs[0], row.printed.images_per_second
        counts = run.deployed.parameters, run.training.parameters, run.deployed.macs
        cells = (
            *(f"{count:,}" for count in counts),
            "" if printed_speed is None else f"{printed_speed:g}",
            f"{median_throughput(run.history):.0f}",
            f"{sum(other.history[-1].seconds for other in row.runs):.0f}",
        )
        lines.append((row.printed.name, row.recipe.model.name if row.recipe else "", *cells))
    counted = "parameters", "in training", "multiply-adds"
    return ("row", "network", *counted, "images/s, printed", "measured", "seconds"), lines


def _printed_error(error: float | None) -> str:
    return "" if error is None else f"{error:.2f}"


def _measured_error(error: MeanError | None) -> str:
    return "" if error is None else f"{error.mean:.2f} ({error.low:.2f} to {error.high:.2f})"


def number(value: float) -> str:
    """Format *value* with four significant digits, or as an integer if it is at least 1000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
