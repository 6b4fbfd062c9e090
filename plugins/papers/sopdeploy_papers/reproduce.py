"""`sopdeploy reproduce`: train the rows of a paper's table."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sopdeploy.base.environment import is_main_process
from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import ProgressBars, err, out, plain_text, print_table, say
from sopdeploy.errors import TrainingError, shorten
from sopdeploy_papers.reproduction.tables import (
    PrintedTable,
    ReproduceOptions,
    find_table,
    load_tables,
)

if TYPE_CHECKING:
    from sopdeploy_papers.reproduction.plan import Reproduction


def _show(result: "list[PrintedTable] | Reproduction") -> None:
    """Print the list of tables, or the plan or the results of one."""
    if isinstance(result, list):
        _print_tables(result)
    elif result.dry_run:
        _print_plan(result)
    else:
        _print_results(result)


@command(
    _show,
    summarize=lambda result: result if isinstance(result, list) else result.summary(),
    distributed=True,
    examples=(
        "sopdeploy reproduce list",
        "sopdeploy reproduce dsop-9a --data cifar --seeds 5",
    ),
)
@expand_options
def reproduce(
    table: str, *, options: ReproduceOptions, dry_run: bool = False, progress: bool = False
) -> "list[PrintedTable] | Reproduction":
    """Train the rows of a paper's table, and write a page with printed and measured figures.

    Finished runs are kept: repeat the command to continue an interrupted table.

    Args:
        table: A table of `reproduce list`, or `list`.
        dry_run: Print rows, commands and estimated GPU hours; write nothing.
        progress: Print progress on stderr.
    """
    if table == "list":
        return list(load_tables().values())
    printed = find_table(table)

    if dry_run:
        from sopdeploy_papers.reproduction.plan import plan

        return plan(printed, options, dry_run=True)
    from sopdeploy.training.distributed import TrainingStoppedError, join_processes
    from sopdeploy_papers.reproduction import run

    with ExitStack() as stack:
        stack.enter_context(join_processes())
        shows_progress = progress and is_main_process()
        bars: Any = stack.enter_context(ProgressBars(err)) if shows_progress else None

        def print_run(row: str, seed: int) -> None:
            if shows_progress:
                err.print(plain_text(f"{row}, seed {seed}"))

        # A row that fails does not stop the others; its page says why.
        try:
            results = run.reproduce(printed, options, callback=bars, on_run=print_run)
        except TrainingStoppedError as stopped:
            stopped.message += "; the same command continues it"
            raise

    if failed := [row.printed.id for row in results.rows if row.failure]:
        raise TrainingError(
            f"{shorten(failed)}: cannot be trained; {results.page} shows why, and the other rows; repeat the "
            "command to try these again"
        )
    return results


def _print_tables(tables: list[PrintedTable]) -> None:
    for table in tables:
        say(f"{table.id}  {table.source}: {table.title}", style="bold")
        rows = []
        for row in table.rows:
            errors = (row.top1, row.top5)
            figures = ("" if error is None else f"{table.shown(error):.2f}" for error in errors)
            rows.append((row.id, f"{row.name}{' (cited)' if row.cited else ''}", *figures))

        names = (f"top-1 {table.metric}", f"top-5 {table.metric}")
        print_table(("row", "printed as", *names), rows)
        out.print()

    out.print(
        "errors and accuracies in percent; no table has been run at the scale of its paper"
    )
    out.print("sopdeploy reproduce TABLE --dry-run prints commands and estimated times")


def _print_plan(planned: "Reproduction") -> None:
    from sopdeploy_papers.reproduction.plan import format_hours

    say(f"{planned.table.source}: {planned.table.title}", style="bold")
    say(*filter(None, (planned.note, planned.deviations, planned.paper_scale)))
    for row in planned.rows:
        time = f"{format_hours(row.gpu_hours)} per seed at paper scale"
        say(f"{row.printed.id}: {time if row.recipe else row.reason}", *planned.commands(row))

    say(f"in total {format_hours(planned.gpu_hours)} for {planned.seeds} seeds at paper scale")
    if commands := [line for row in planned.rows for line in planned.commands(row)]:
        say("on several GPUs, start every command with torchrun, such as")
        say(f"torchrun --nproc-per-node 8 -m {commands[0]}")


def _print_results(results: "Reproduction") -> None:
    from sopdeploy_papers.reproduction.page import error_table, fact_table, notes

    trained = results.table.measures == "errors"
    table = error_table(results.table, results.rows) if trained else fact_table(results.rows)
    print_table(table.columns, (map(str, row) for row in table.rows))
    say(*(f"{name}: {note}" for name, note in notes(results.rows)))
    say(*filter(None, (results.note, results.deviations, results.paper_scale)))

    names = "accuracies" if results.table.accuracy else "errors"
    unit = f"{names} in percent with 95 % intervals; " if trained else ""
    say(f"{unit}page: {results.page}")
