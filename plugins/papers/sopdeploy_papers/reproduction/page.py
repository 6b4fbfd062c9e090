"""The page of a reproduced table: printed figures beside measured ones, curves, commands."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from sopdeploy.errors import amount
from sopdeploy.html.plots import component_chart, plot
from sopdeploy.html.report import Figure, HtmlReport, Section, Table, render
from sopdeploy.training.diagnostics import EpochRow, history_curve
from sopdeploy_papers.reproduction.plan import ReproducedRow, Reproduction
from sopdeploy_papers.reproduction.results import MeanError, mean_error
from sopdeploy_papers.reproduction.tables import PrintedTable

_METRICS = {"top1": "top-1", "top5": "top-5"}


def render_page(results: Reproduction) -> str:
    """Render the page as HTML; the same results always give the same text."""
    table = results.table
    finished = [row for row in results.rows if row.runs]
    # By name: the history with seed 0, and no prefix of its columns (`_metric_charts`).
    curves = {row.printed.name: (row.runs[0].history, "") for row in finished}

    # One command reproduces a row alone.
    commands = Table(
        caption="Each command trains one row, with seed 0",
        columns=("row", "command"),
        rows=[
            (row.printed.name, results.commands(row)[0]) for row in results.rows if row.recipe
        ],
    )

    charts = [*_option_chart(table, finished)]
    charts += chain.from_iterable(_row_charts(table, row) for row in finished)

    sections = [
        _describe_results(results, finished),
        Section(title="Curves", figures=list(_metric_charts(table, curves, "Seed 0"))),
        Section(title="Figures", figures=charts),
        Section(title="Counts and other figures", tables=[fact_table(results.rows)]),
        Section(title="Commands", tables=[commands]),
    ]

    text = [table.title, *filter(None, [results.deviations, results.paper_scale])]
    return render(HtmlReport(title=table.source, text=text, sections=sections))


def _describe_results(results: Reproduction, finished: Sequence[ReproducedRow]) -> Section:
    """Describe how the rows are measured, and list printed and measured errors."""
    table = results.table
    text = []
    tables = []

    if table.measures == "counts":
        text.append("The networks are built and counted, not trained.")
    elif table.measures == "nothing":
        text.append("The figures are from the paper; nothing is counted or measured.")
    else:
        tables += [error_table(table, results.rows), _branch_table(table, finished)]
        if finished:
            run = finished[0].runs[0]
            seeds = results.seeds
            text.append(
                f"Measured: last epoch on {run.held_out_count} validation images after training on "
                f"{run.train_count}, {amount(seeds, 'seed')}, 95 % interval over "
                f"{'seeds (Student)' if seeds > 1 else 'images (Wilson)'}."
            )

    if note := results.note:
        text.append(f"{note[0].upper()}{note[1:]}.")

    explained = list(notes(results.rows))
    tables.append(
        Table(caption="Notes on the printed figures", columns=("row", "note"), rows=explained)
    )
    return Section(title="Results", text=text, tables=tables)


def notes(rows: Sequence[ReproducedRow]) -> Iterator[tuple[str, str]]:
    """Yield the notes on *rows* and their counts, each once for a row, with the names of what it explains."""
    for row in rows:
        if row.printed.note:
            yield row.printed.name, row.printed.note

        for note in dict.fromkeys(
            figure.note for figure in row.figures.values() if figure.note
        ):
            names = ", ".join(
                name for name, figure in row.figures.items() if figure.note == note
            )
            yield f"{row.printed.name}: {names}", note


def error_table(table: PrintedTable, rows: Sequence[ReproducedRow]) -> Table:
    """Format the printed and the measured errors or accuracies of *rows* of *table*, in percent.

    Teachers are left out.
    """
    lines = []
    for row in rows:
        printed = row.printed
        if printed.teacher:
            continue
        name = f"{printed.name} (cited)" if printed.cited else printed.name
        top1 = _printed(table, printed.top1), _measured(table, mean_error(row.runs, "top1"))
        top5 = _printed(table, printed.top5), _measured(table, mean_error(row.runs, "top5"))
        lines.append((name, *top1, *top5, row.status))

    columns = ("row", "top-1 printed", "measured", "top-5 printed", "measured", "status")
    names = "accuracies" if table.accuracy else "errors"
    return Table(
        caption=f"Printed and measured {names} in percent", columns=columns, rows=lines
    )


def fact_table(rows: Sequence[ReproducedRow]) -> Table:
    """Format the printed counts and facts of *rows*, each beside the one that was counted or measured."""
    figures = [
        (row.printed.name, name, figure) for row in rows for name, figure in row.figures.items()
    ]

    if all(figure.found is None for _, _, figure in figures):
        lines = [(row, name, _number(figure.printed)) for row, name, figure in figures]
        return Table(
            caption="Printed figures", columns=("row", "figure", "printed"), rows=lines
        )

    # Each printed figure beside the own one.
    compared = []
    for row, name, figure in figures:
        # a multiple of the count of ResNet-50
        multiple = " x ResNet-50" if figure.unit == "x" else ""
        printed = _number(figure.printed) + multiple
        compared.append((row, name, printed, _number(figure.found), figure.mark))

    caption = (
        "Counts of the paper's networks at its image size and number of classes. GFLOPs are multiply-adds, "
        "or operations by the paper's convention where it is known. A cross marks a count that differs from "
        "the printed figure; the notes say why"
    )
    columns = ("row", "figure", "printed", "counted or measured", "")
    return Table(caption=caption, columns=columns, rows=compared)


def _branch_table(table: PrintedTable, rows: Sequence[ReproducedRow]) -> Table:
    """Format printed and measured errors or accuracies of the branches, averaged over seeds."""
    lines = []
    for row in rows:
        for name in row.runs[0].heads:
            if name == "main":
                continue

            stage = name.partition("_")[0]  # a branch is named after its stage and block
            printed_top1, printed_top5 = row.printed.heads.get(stage, (None, None))
            # The metrics of this branch, with each seed
            heads = [run.heads[name] for run in row.runs]
            top1, top5 = (
                sum(table.shown(100 * (1 - getattr(head, key))) for head in heads) / len(heads)
                for key in _METRICS
            )

            printed = _printed(table, printed_top1), _printed(table, printed_top5)
            cells = printed[0], f"{top1:.2f}", printed[1], f"{top5:.2f}"
            lines.append((f"{row.printed.name}, {name}", *cells))
    columns = ("branch", "top-1 printed", "measured", "top-5 printed", "measured")
    return Table(caption="Branches, on all validation images", columns=columns, rows=lines)


def _printed(table: PrintedTable, error: float | None) -> str:
    return "" if error is None else f"{table.shown(error):.2f}"


def _measured(table: PrintedTable, error: MeanError | None) -> str:
    if error is None:
        return ""
    low, high = sorted((table.shown(error.low), table.shown(error.high)))
    return f"{table.shown(error.mean):.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None) -> str:
    """Format *value* with four significant digits, or as an integer if it is at least 1000."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _metric_charts(
    table: PrintedTable, curves: Mapping[str, tuple[Sequence[EpochRow], str]], caption: str
) -> Iterator[Figure]:
    """Plot top-1 and top-5 error, or accuracy, over the epochs; no chart without *curves*.

    These are histories by name, each with the prefix of its columns: "" for the network,
    "HEAD_" for a head.
    """
    if not curves:
        return
    for metric, rank in _METRICS.items():
        label = f"{rank} {table.metric} in %"
        points = {}
        for name, (history, prefix) in curves.items():
            shares = history_curve(history, f"{prefix}{metric}")
            points[name] = [(epoch, table.shown(100 * (1 - share))) for epoch, share in shares]
        yield Figure(image=plot(points, "epoch", label), caption=f"{caption}: {label}.")


def _option_chart(table: PrintedTable, rows: Sequence[ReproducedRow]) -> Iterator[Figure]:
    """Draw the paper's chart: finished *rows* over the value of the network option `table.over`.

    Each value of the option `table.curve` has a curve. No chart if all rows have the same value
    of `over`.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        options = row.runs[0].network
        error = mean_error(row.runs, "top1")
        if table.over in options and error is not None:
            name = f"{table.curve} = {options[table.curve]}" if table.curve else "measured"
            curves.setdefault(name, []).append(
                (float(options[table.over]), table.shown(error.mean))
            )

    values = {value for points in curves.values() for value, _ in points}
    if len(values) > 1:
        ordered = {name: sorted(points) for name, points in curves.items()}
        label = f"top-1 {table.metric} in %"
        chart = plot(ordered, table.over, label, logarithmic=max(values) > 100 * min(values))
        yield Figure(
            image=chart, caption=f"Top-1 {table.metric} over {table.over}, {table.title}."
        )


def _row_charts(table: PrintedTable, row: ReproducedRow) -> Iterator[Figure]:
    """Plot what the heads reach, and draw the use of the components, in the run with seed 0."""
    run = row.runs[0]
    # The network's own head is the last one
    heads = sorted(run.heads, key=lambda head: head == "main")

    diagnostics = run.history[-1].diagnostics
    if diagnostics is not None and diagnostics.num_images:
        caption = f"Heads of {row.printed.name} on a fixed subset of {diagnostics.num_images} validation images"
        # Columns such as `main_top1`
        curves = {head: (run.history, f"{head}_") for head in heads}
        yield from _metric_charts(table, curves, caption)

    if run.usage:
        yield component_chart(run.usage, f"Images per component, {row.printed.name}")
