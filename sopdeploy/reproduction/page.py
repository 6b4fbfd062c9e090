"""The page of a reproduced table: printed figures beside measured ones, curves, commands."""

from collections.abc import Sequence

import torch

from sopdeploy.environment import machine
from sopdeploy.html.templates import render
from sopdeploy.reproduction.figures import curve_charts, row_charts
from sopdeploy.reproduction.layer_times import BATCH, CHANNELS, SIDE
from sopdeploy.reproduction.plan import Reproduction, Row
from sopdeploy.reproduction.results import MeanError

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]  # column names and rows

ABOUT = {
    "errors": "",
    "counts": "The networks are built and counted, not trained.",
    "times": (
        f"Measured on this machine: maps of {CHANNELS} channels at {SIDE} x {SIDE} positions, per image of a "
        f"batch of {BATCH}; memory is the peak of the results of all operations. "
        "Printed times are those of GPUs and of implementations in C++ and Matlab: compare their ratios."
    ),
}
COUNTED = {  # keys of `Counts`
    "params": "parameters (M)",
    "train_params": "parameters in training (M)",
    "gflops": "GFLOPs",
    "train_gflops": "GFLOPs in training",
    "dim": "classified vector",
}


def render_page(results: Reproduction) -> str:
    """Render the page as HTML; the same results always give the same text."""
    done = [row for row in results.rows if row.runs]
    first = done[0].runs[0] if done else None
    measures = results.table.measures
    return render(
        "sopdeploy.reproduction",
        "table.html",
        results=results,
        table=results.table,
        row_notes=[(row.printed.name, row.printed.note) for row in results.rows if row.printed.note],
        interval=f"95 % interval over {'seeds (Student)' if results.seeds > 1 else 'images (Wilson)'}",
        first=first,
        machine=first.machine if first else _layer_machine(results) if measures == "times" else {},
        about=ABOUT[measures],
        errors=error_table(results.rows),
        branches=_branch_table(done),
        facts=fact_table(results.rows),
        runs=_run_table(done),
        curves=curve_charts(done),
        charts=row_charts(done),
        commands=[(row.printed.name, row.command(results.folder, 0)) for row in results.rows if row.recipe],
    )


def _layer_machine(results: Reproduction) -> dict[str, str | int | float]:
    device, threads = results.layer_device
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": name, "threads": threads, **machine()}


def error_table(rows: Sequence[Row]) -> Table:
    """Format the printed and the measured errors of *rows*, in percent."""
    lines = []
    for row in rows:
        printed = row.printed
        if not printed.teacher:
            name = f"{printed.name}{' (cited)' if printed.cited else ''}"
            top1, top5 = _measured(row.top1), _measured(row.top5)
            lines.append((name, _printed(printed.top1), top1, _printed(printed.top5), top5, row.status))
    heads = "row", "top-1 printed", "measured", "top-5 printed", "measured", "status"
    return heads, lines


def fact_table(rows: Sequence[Row]) -> Table:
    """Format the printed counts and facts of *rows*, each beside the one that was counted or measured."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        unit = " x ResNet-50" if row.printed.times else ""  # some papers print multiples
        for key, name in COUNTED.items():
            printed = getattr(row.printed, key)
            if printed is not None and row.counts is not None:
                counted = getattr(row.counts, key)
                lines.append((row.printed.name, name, f"{number(printed)}{unit}", number(counted)))
        for name in row.printed.facts | row.facts:
            values = row.printed.facts.get(name), row.facts.get(name)
            cells = ("" if value is None else number(value) for value in values)
            lines.append((row.printed.name, name, *cells))
    return ("row", "figure", "printed", "counted or measured"), lines


def _branch_table(rows: Sequence[Row]) -> Table:
    """Format printed and measured errors of the branches, averaged over seeds."""
    lines = []
    for row in rows:
        for name in row.runs[0].heads:
            if name == "main":
                continue
            stage = name.partition("_")[0]  # a branch is named after its stage and block
            printed = row.printed.heads.get(stage, (None, None))
            heads = [run.heads[name] for run in row.runs]
            top1 = 100 * sum(head.top1 for head in heads) / len(heads)
            top5 = 100 * sum(head.top5 for head in heads) / len(heads)
            cells = _printed(printed[0]), f"{top1:.2f}", _printed(printed[1]), f"{top5:.2f}"
            lines.append((f"{row.printed.name}, {name}", *cells))
    return ("branch", "top-1 printed", "measured", "top-5 printed", "measured"), lines


def _run_table(rows: Sequence[Row]) -> Table:
    """Format the networks that were trained, and the speed of their training."""
    lines = []
    for row in rows:
        run, speed = row.runs[0], row.printed.images_per_second
        counts = run.deployed.parameters, run.training.parameters, run.deployed.macs
        cells = (
            *(f"{count:,}" for count in counts),
            "" if speed is None else f"{speed:g}",
            f"{run.images_per_second:.0f}",
            f"{sum(run.history[-1].seconds for run in row.runs):.0f}",
        )
        lines.append((row.printed.name, row.recipe.model.name if row.recipe else "", *cells))
    counted = "parameters", "in training", "multiply-adds"
    return ("row", "network", *counted, "images/s, printed", "measured", "seconds"), lines


def _printed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _measured(value: MeanError | None) -> str:
    return "" if value is None else f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def number(value: float) -> str:
    """Format *value* with four significant digits, or as an integer if it is at least 1000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
