"""`sopdeploy reproduce`: train the rows of a paper's table and compare printed with measured figures."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sopdeploy.api.progress import ProgressBars
from sopdeploy.cli.command import command
from sopdeploy.cli.console import JsonOption, err, out, plain_text, print_json
from sopdeploy.cli.training.train import exit_on_signal
from sopdeploy.reproduction.options import ReproduceOptions

if TYPE_CHECKING:
    from sopdeploy.reproduction.results import Reproduction
    from sopdeploy.reproduction.tables import PrintedTable

LIST = "list"


@command()
def reproduce(
    table: Annotated[str, typer.Argument(metavar="list|TABLE", help="A table of `reproduce list`.")],
    *,
    options: ReproduceOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, commands and estimated GPU hours; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the rows of a paper's table, and write a page with printed and measured figures.

    Finished runs are kept: repeat the command to continue an interrupted table.

    Example: [bold]sopdeploy reproduce list[/bold]

    Example: [bold]sopdeploy reproduce dsop-9a --data cifar --seeds 5[/bold]

    Example: [bold]sopdeploy reproduce dsop-9a --scale small[/bold]
    """
    from sopdeploy.reproduction.tables import TABLES, find_table

    if table == LIST:
        _print_tables(list(TABLES.values()), as_json=as_json)
        return
    printed = find_table(table)
    if dry_run:
        _print_plan(printed, options, as_json=as_json)
        return
    with exit_on_signal(hint=" or with the same command"), ExitStack() as stack:
        from sopdeploy.reproduction.run import reproduce as run
        from sopdeploy.training.distributed.torchrun import is_main_process, join_processes

        stack.enter_context(join_processes())
        quiet = as_json or not is_main_process()
        progress: Any = None if quiet else stack.enter_context(ProgressBars(err))
        found = run(
            printed,
            options,
            callback=progress,
            on_run=lambda row, seed: None if quiet else err.print(plain_text(f"{row}, seed {seed}")),
        )
        if not is_main_process():
            return
    if as_json:
        print_json(found.summary())
    else:
        _print_results(found)


def _print_tables(tables: "list[PrintedTable]", *, as_json: bool) -> None:
    if as_json:
        print_json([table.model_dump(mode="json") for table in tables])
        return
    for table in tables:
        out.print(plain_text(f"{table.id}  {table.source}: {table.title}"), style="bold")
        lines = Table("row", "printed as", "top-1", "top-5", "", box=None, pad_edge=False)
        for row in table.rows:
            errors = ("" if error is None else f"{error:.2f}" for error in (row.top1, row.top5))
            measured = {"counts": "counted", "times": "timed"}.get(table.measures)
            trained = measured or ("" if table.recipe_of(row) else "not run")
            kind = ", ".join(filter(None, ("cited" if row.cited else "", trained)))
            lines.add_row(row.id, plain_text(row.name), *errors, "teacher" if row.teacher else kind)
        out.print(lines)
        out.print()
    out.print("errors in percent; sopdeploy reproduce TABLE --dry-run prints commands and estimated times")


def _print_plan(table: "PrintedTable", options: ReproduceOptions, *, as_json: bool) -> None:
    from sopdeploy.reproduction.plan import ASSUMPTION, plan_rows
    from sopdeploy.reproduction.small import statement

    folder, seeds = options.folder(table), options.runs_per_row(table)
    jobs = plan_rows(table, options)
    hours = sum(job.gpu_hours for job in jobs) * seeds
    if as_json:
        lines = [
            {
                "row": job.row.id,
                "runs": job.recipe is not None,
                "reason": job.reason,
                "gpu_hours": job.gpu_hours,
                "commands": [job.command(folder, seed) for seed in range(seeds)] if job.recipe else [],
            }
            for job in jobs
        ]
        said = statement(table, options.scale)
        print_json({"table": table.id, "statement": said, "gpu_hours": hours, "rows": lines})
        return
    out.print(plain_text(f"{table.source}: {table.title}"), style="bold")
    if said := statement(table, options.scale):
        out.print(plain_text(said))
    for job in jobs:
        out.print()
        if job.recipe is None:
            out.print(plain_text(f"{job.row.id}: {job.reason}"))
            continue
        out.print(plain_text(f"{job.row.id}: {job.gpu_hours:.2g} GPU hours per seed"))
        for seed in range(seeds):
            out.print(plain_text(f"  {job.command(folder, seed)}"))
    out.print()
    out.print(plain_text(f"in total {hours:.2g} GPU hours for {seeds} seeds ({ASSUMPTION})"))


def _print_results(found: "Reproduction") -> None:
    if found.measures != "errors":
        _print_facts(found)
        return
    table = Table("row", "top-1 printed", "measured", "top-5 printed", "measured", box=None, pad_edge=False)
    for row in found.rows:
        cells = []
        for name in ("top1", "top5"):
            printed, measured = getattr(row.printed, name), getattr(row, name)
            cells.append("" if printed is None else f"{printed:.2f}")
            cells.append(
                "" if measured is None else f"{measured.mean:.2f} ({measured.low:.2f} to {measured.high:.2f})"
            )
        table.add_row(plain_text(row.printed.name), *cells)
    out.print(table)
    if found.statement:
        out.print(plain_text(found.statement))
    out.print(plain_text(f"errors in percent with 95 % intervals; page: {found.page}"))


def _print_facts(found: "Reproduction") -> None:
    """Show the printed and the measured figures of a table of counts or times."""
    from sopdeploy.reproduction.page import fact_figures, number

    names = {"params": "parameters (M)", "gflops": "GFLOPs", "dim": "classified vector"}
    table = Table("row", "figure", "printed", "measured", box=None, pad_edge=False)
    for row in found.rows:
        counted = dict(row.counted or ())
        figures = [
            (row.printed.name, name, number(printed), number(counted[key]))
            for key, name in names.items()
            if key in counted and (printed := getattr(row.printed, key)) is not None
        ]
        for cells in (*figures, *fact_figures(row)):
            table.add_row(*map(plain_text, cells))
    out.print(table)
    out.print(plain_text(f"page: {found.page}"))
