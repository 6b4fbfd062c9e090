"""The page of a reproduced table: printed figures beside measured ones, curves, commands."""

from sopdeploy.environment import machine
from sopdeploy.html.templates import render
from sopdeploy.reproduction.figures import curve_charts, figure_charts
from sopdeploy.reproduction.layer_times import BATCH, CHANNELS, SIDE
from sopdeploy.reproduction.results import MeanError, Reproduction, RowResult
from sopdeploy.reproduction.tables import PrintedTable

HEADS = (
    "row",
    "top-1 error, printed",
    "top-1 error, measured",
    "top-5 error, printed",
    "top-5 error, measured",
    "status",
)
COUNT_HEADS = (
    "row",
    "parameters (M), printed",
    "counted",
    "in training, printed",
    "counted",
    "GFLOPs, printed",
    "counted",
    "in training, printed",
    "counted",
    "vector, printed",
    "counted",
)
ABOUT = {
    "counts": "The networks are built and counted, not trained.",
    "times": (
        f"Measured: one thread of this machine's CPU, maps of {CHANNELS} channels at {SIDE} x {SIDE} "
        f"positions, per image of a batch of {BATCH}; memory is the peak of the results of all operations. "
        "Printed times are those of GPUs and of implementations in C++ and Matlab: compare their ratios."
    ),
}
RUN_HEADS = (
    "row",
    "network",
    "parameters",
    "in training",
    "multiply-adds",
    "images/s, printed",
    "measured",
    "seconds",
    "seeds",
)


def render_page(reproduction: Reproduction, table: PrintedTable) -> str:
    """Render the page as HTML; the same results always give the same text."""
    done = [row for row in reproduction.rows if row.runs]
    heads = [
        (f"{row.printed.name}, {name}", *_head_figures(row, name))
        for row in done
        for name in row.runs[0].heads
        if name != "main"
    ]
    interval = (
        "Student's 95 % interval over seeds"
        if reproduction.seeds > 1
        else "Wilson's 95 % interval over images"
    )
    first = done[0].runs[0] if done else None
    return render(
        "sopdeploy.reproduction",
        "table.html",
        reproduction=reproduction,
        row_notes=[(row.printed.name, row.printed.note) for row in reproduction.rows if row.printed.note],
        table_note=table.note,
        facts=[figures for row in reproduction.rows for figures in fact_figures(row)],
        interval=interval,
        train_count=first.train_count if first else 0,
        held_out_count=first.held_out_count if first else 0,
        machine=list(
            (first.machine if first else machine() if reproduction.measures == "times" else {}).items()
        ),
        about=ABOUT.get(reproduction.measures),
        head_names=HEADS,
        errors=[_error_figures(row) for row in reproduction.rows if not row.printed.teacher],
        head_errors=heads,
        count_names=COUNT_HEADS,
        counts=[_count_figures(row) for row in reproduction.rows if row.counted is not None],
        run_names=RUN_HEADS,
        runs=[_run_figures(row) for row in done],
        curves=curve_charts(reproduction),
        figures=figure_charts(reproduction, table.figures),
        commands=[(row.printed.name, row.command) for row in reproduction.rows if row.command],
    )


def _printed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _measured(value: MeanError | None) -> str:
    return "" if value is None else f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def _error_figures(row: RowResult) -> tuple[str, ...]:
    printed = row.printed
    return (
        f"{printed.name}{' (cited)' if printed.cited else ''}",
        _printed(printed.top1),
        _measured(row.top1),
        _printed(printed.top5),
        _measured(row.top5),
        row.status,
    )


def _head_figures(row: RowResult, name: str) -> tuple[str, ...]:
    """Return printed and measured errors of the branch *name*, averaged over seeds."""
    printed = row.printed.heads.get(name.partition("_")[0])  # a branch is named after its stage and block
    measured = [run.heads[name] for run in row.runs]
    top1, top5 = (
        100 * sum(getattr(head, key) for head in measured) / len(measured) for key in ("top1", "top5")
    )
    return (
        _printed(printed[0] if printed else None),
        f"{top1:.2f}",
        _printed(printed[1] if printed else None),
        f"{top5:.2f}",
    )


def _count_figures(row: RowResult) -> tuple[str, ...]:
    printed, counted = row.printed, row.counted
    if counted is None:
        return (printed.name,)
    unit = " x ResNet-50" if printed.times else ""
    figures = [printed.name]
    for key in ("params", "train_params", "gflops", "train_gflops"):
        value = getattr(printed, key)
        figures += ["" if value is None else f"{value:g}{unit}", f"{getattr(counted, key):.4g}"]
    return (*figures, "" if printed.dim is None else f"{printed.dim:,}", f"{counted.dim:,}")


def number(value: float) -> str:
    """Format *value* with four significant digits, or as an integer if it is at least 1000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def fact_figures(row: RowResult) -> list[tuple[str, str, str, str]]:
    """Format the facts of *row* as (row name, fact name, printed value, measured value)."""
    printed, measured = row.printed.facts, row.facts
    names = (*printed, *(name for name in measured if name not in printed))
    shown = [{name: number(value) for name, value in facts.items()} for facts in (printed, measured)]
    return [(row.printed.name, name, shown[0].get(name, ""), shown[1].get(name, "")) for name in names]


def _run_figures(row: RowResult) -> tuple[str, ...]:
    run = row.runs[0]
    return (
        row.printed.name,
        row.network,
        f"{run.deployed.parameters:,}",
        f"{run.training.parameters:,}",
        f"{run.deployed.macs:,}",
        "" if row.printed.images_per_second is None else f"{row.printed.images_per_second:g}",
        f"{run.images_per_second:.0f}",
        f"{sum(run.history[-1].seconds for run in row.runs):.0f}",
        str(len(row.runs)),
    )
