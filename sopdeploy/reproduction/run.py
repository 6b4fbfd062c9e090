"""Run the rows of a table: finished runs are kept, interrupted ones continue from their `last.pt`."""

import json
from collections.abc import Callable
from pathlib import Path

import pydantic

from sopdeploy.checkpoint import Checkpoint, read_checkpoint
from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write
from sopdeploy.models.describe import describe
from sopdeploy.report.run_data import read_history
from sopdeploy.reproduction.layer_times import time_layer
from sopdeploy.reproduction.measure import condition_numbers, measure_heads
from sopdeploy.reproduction.options import ReproduceOptions
from sopdeploy.reproduction.page import render_page
from sopdeploy.reproduction.plan import Job, plan_rows, run_path
from sopdeploy.reproduction.results import Reproduction, RowResult, SeedResult, measure_errors
from sopdeploy.reproduction.small import small_data, statement, write_small_images
from sopdeploy.reproduction.tables import PrintedTable
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.distributed.torchrun import is_main_process
from sopdeploy.training.loop import TrainingResult, train
from sopdeploy.training.recipe import Recipe, read_recipe

RESULT, PAGE = "result.json", "index.html"


def reproduce(
    table: PrintedTable,
    options: ReproduceOptions,
    *,
    callback: Callback | None = None,
    on_run: Callable[[str, int], None] = lambda _row, _seed: None,
) -> Reproduction:
    """Run the rows of *table* and write a page about them.

    The runs are in `<out>/<table>-<scale>/<row>/seed-0`; the page is written after every row. *on_run*
    receives the row and seed of each run that starts. Raises `ConfigError` for selected rows that cannot be
    run and for results of another recipe in the folder, and the errors of `train`.
    """
    folder = options.folder(table)
    jobs = plan_rows(table, options)
    for job in jobs:
        if job.recipe is None and options.rows is not None and table.measures == "errors":
            raise ConfigError(f"--rows {job.row.id}: cannot be run ({job.reason}); leave it out")
    if options.scale == "small" and table.measures == "errors":
        write_small_images(options.data, small_data(options.out, options.data))
    runs: dict[str, list[SeedResult]] = {job.row.id: [] for job in jobs}
    times: dict[str, dict[str, float]] = {}
    for job in jobs:
        if job.row.layer is not None:
            times[job.row.id] = time_layer(job.row.layer)
        elif job.recipe is not None:
            for seed in range(options.runs_per_row(table)):
                runs[job.row.id].append(_run(job, folder, seed, callback, on_run))
        else:
            continue
        _write(_summarize(table, options, jobs, runs, times), table)
    reproduction = _summarize(table, options, jobs, runs, times)
    _write(reproduction, table)
    return reproduction


def _run(
    job: Job,
    folder: Path,
    seed: int,
    callback: Callback | None,
    on_run: Callable[[str, int], None],
) -> SeedResult:
    """Return the stored result of a run, or run it first."""
    path = run_path(folder, job.row.id, seed)
    recipe = read_recipe(job.source, job.overrides_of(folder, seed))
    stored = _read_result(path / RESULT, recipe)
    if stored is not None:
        return stored
    on_run(job.row.id, seed)
    trained = train(recipe, path, resume="auto", callback=callback)
    result = _measure(recipe, trained)
    if not is_main_process():
        return result
    with atomic_write(path / RESULT) as partial:
        partial.write_text(result.model_dump_json() + "\n", encoding="utf-8")
    return result


def _read_result(path: Path, recipe: Recipe) -> SeedResult | None:
    """Read the result at *path* if there is one; raise `ConfigError` if it is not that of *recipe*."""
    if not path.is_file():
        return None
    try:
        stored = SeedResult.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: not a result ({first_problem(error)}); remove this file") from error
    if stored.recipe != recipe.model_dump(mode="json"):
        raise ConfigError(
            f"{path}: the row was trained with another recipe or other data; choose another --out"
        )
    return stored


def _measure(recipe: Recipe, trained: TrainingResult) -> SeedResult:
    """Measure what the table and the charts show of a finished run."""
    checkpoint: Checkpoint = read_checkpoint(trained.last)
    history = read_history(checkpoint, trained.last)
    counts = describe(
        checkpoint.model,
        image_size=recipe.preprocess.crop,
        num_classes=len(checkpoint.labels),
        **checkpoint.config,
    )
    return SeedResult(
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json"),
        network=checkpoint.config,
        history=history,
        train_count=trained.train_count,
        held_out_count=trained.held_out_count,
        training=counts.training,
        deployed=counts.shipped,
        heads=measure_heads(checkpoint, recipe, trained.last, history[-1].losses),
        usage=history[-1].component_counts,
        condition=condition_numbers(history),
        machine=checkpoint.training.get("machine", {}),
    )


def _summarize(
    table: PrintedTable,
    options: ReproduceOptions,
    jobs: tuple[Job, ...],
    runs: dict[str, list[SeedResult]],
    times: dict[str, dict[str, float]],
) -> Reproduction:
    """Combine the results so far with the printed figures."""
    rows = []
    for job in jobs:
        done = tuple(runs[job.row.id])
        counted = job.counts.facts if job.counts is not None else {}
        rows.append(
            RowResult(
                printed=job.row,
                status="measured" if done else job.reason or "not run",
                command=job.command(options.folder(table), 0) if job.recipe is not None else "",
                counted=job.counts,
                facts=times.get(job.row.id, counted),
                network=job.recipe.model.name if job.recipe is not None else "",
                top1=measure_errors(done, "top1"),
                top5=measure_errors(done, "top5"),
                runs=done,
            )
        )
    return Reproduction(
        table=table.id,
        source=table.source,
        title=table.title,
        scale=options.scale,
        statement=statement(table, options.scale),
        measures=table.measures,
        seeds=options.runs_per_row(table),
        data=None if options.data is None else str(options.data),
        page=options.folder(table) / PAGE,
        rows=tuple(rows),
    )


def _write(reproduction: Reproduction, table: PrintedTable) -> None:
    """Write the page and the summary; of the processes of torchrun, the first one does."""
    if not is_main_process():
        return
    summary = json.dumps(reproduction.summary(), indent=2) + "\n"
    reproduction.page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (reproduction.page, render_page(reproduction, table)),
        (reproduction.page.parent / RESULT, summary),
    ):
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
