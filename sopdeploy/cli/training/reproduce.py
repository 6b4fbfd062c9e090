"""`sopdeploy reproduce`: train the rows of a paper's table."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.api.progress import ProgressBars
from sopdeploy.cli.command import command
from sopdeploy.cli.console import JsonOption, err, out, plain_text, print_json, print_table, say
from sopdeploy.cli.training.train import exit_on_signal
from sopdeploy.reproduction.tables import PrintedTable, ReproduceOptions, find_table, load_tables

if TYPE_CHECKING:
    from sopdeploy.reproduction.plan import Reproduction


@command()
def reproduce_command(
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

    Example: sopdeploy reproduce list

    Example: sopdeploy reproduce dsop-9a --data cifar --seeds 5

    Example: sopdeploy reproduce dsop-9a --scale small
    """
    if table == "list":
        _print_tables(list(load_tables().values()), as_json=as_json)
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
        results = run(
            printed,
            options,
            callback=progress,
            on_run=lambda row, seed: None if quiet else err.print(plain_text(f"{row}, seed {seed}")),
        )
        if not is_main_process():
            return
    if as_json:
        print_json(results.summary())
    else:
        _print_results(results)


def _print_tables(tables: "list[PrintedTable]", *, as_json: bool) -> None:
    if as_json:
        print_json([table.model_dump(mode="json") for table in tables])
        return
    for table in tables:
        say(f"{table.id}  {table.source}: {table.title}", style="bold")
        lines = []
        for row in table.rows:
            errors = ("" if error is None else f"{error:.2f}" for error in (row.top1, row.top5))
            kinds = ["cited"] if row.cited else []
            if row.teacher:
                kinds = ["teacher"]
            elif table.measures != "errors":
                kinds.append({"counts": "counted", "times": "timed"}[table.measures])
            elif table.recipe_of(row) is None:
                kinds.append("not run")
            lines.append((row.id, row.name, *errors, ", ".join(kinds)))
        print_table(("row", "printed as", "top-1", "top-5", ""), lines)
        out.print()
    out.print("errors in percent; no table has been run at the scale of its paper")
    out.print("sopdeploy reproduce TABLE --dry-run prints commands and estimated times")


def _print_plan(table: PrintedTable, options: ReproduceOptions, *, as_json: bool) -> None:
    from sopdeploy.reproduction.plan import ASSUMPTION, format_hours, plan

    planned = plan(table, options)
    hours = sum(row.gpu_hours for row in planned.rows) * planned.seeds
    planned_commands = [
        (row, [row.command(planned.folder, seed) for seed in range(planned.seeds) if row.recipe])
        for row in planned.rows
    ]
    lines: list[dict[str, Any]] = [
        {
            "row": row.printed.id,
            "runs": row.recipe is not None,
            "reason": row.reason,
            "gpu_hours": row.gpu_hours,
            "commands": commands,
            "torchrun": [f"torchrun --nproc-per-node 8 -m {command}" for command in commands],
        }
        for row, commands in planned_commands
    ]
    if as_json:
        print_json(
            {
                "table": table.id,
                "statement": planned.statement,
                "paper_scale": planned.paper_scale,
                "gpu_hours": hours,
                "rows": lines,
            }
        )
        return
    say(f"{table.source}: {table.title}", style="bold")
    for text in filter(None, (planned.statement, planned.paper_scale)):
        say(text)
    for line in lines:
        time = f"{format_hours(line['gpu_hours'])} per seed"
        say(f"{line['row']}: {time if line['runs'] else line['reason']}", *line["commands"])
    say(f"in total {format_hours(hours)} for {planned.seeds} seeds ({ASSUMPTION})")
    for line in [line for line in lines if line["torchrun"]][:1]:
        say("on several GPUs, start every command with torchrun, such as", line["torchrun"][0])


def _print_results(results: "Reproduction") -> None:
    from sopdeploy.reproduction.page import error_table, fact_table

    trained = results.table.measures == "errors"
    table = error_table(results.rows) if trained else fact_table(results.rows)
    print_table(table.columns, (map(str, row) for row in table.rows))
    for text in filter(None, (results.statement, results.paper_scale)):
        say(text)
    unit = "errors in percent with 95 % intervals; " if trained else ""
    say(f"{unit}page: {results.page}")
