"""Run the rows of a table: finished runs are kept, interrupted ones continue from their `last.pt`."""

import json
from collections.abc import Callable
from pathlib import Path

import pydantic

from sopdeploy.base.config import first_problem, parse_json
from sopdeploy.base.environment import is_distributed, is_main_process
from sopdeploy.base.files import MAX_NAMES_BYTES, atomic_write, read_file, writing
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, SopdeployError, TrainingError
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import TrainingStoppedError
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from sopdeploy.training.train import train_recipe
from sopdeploy_papers.reproduction.page import render_page
from sopdeploy_papers.reproduction.plan import ReproducedRow, Reproduction, plan
from sopdeploy_papers.reproduction.results import SeedResult, measure_run, measured_facts
from sopdeploy_papers.reproduction.tables import PrintedTable, ReproduceOptions

_RESULT = "result.json"


def reproduce(
    table: PrintedTable,
    options: ReproduceOptions,
    *,
    callback: Callback | None = None,
    on_run: Callable[[str, int], None] = lambda _row, _seed: None,
) -> Reproduction:
    """Run the rows of *table* and write a page about them.

    The runs are in `<out>/<table>/<row>/seed-0`; the page is written after every row. *on_run*
    receives the row and seed of each run that starts. A row that fails has a `failure`, and the
    next one runs. Raises:

    - `ConfigError` for selected rows that cannot be run, if `options.set` leaves none to run, and
      for results of another recipe in the folder,
    - the error of data that cannot be opened,
    - `TrainingStoppedError`,
    - with several processes, all errors of a row but `TrainingError`: one process may have such
      an error alone.
    """
    results = plan(table, options)

    # Errors about the rows and the data come before hours of training.
    if table.measures == "errors":  # the rows of other tables are not trained
        _check_rows(results)
    _check_data(results)

    by_id = {row.printed.id: row for row in results.rows}
    for row in results.rows:
        if row.recipe is None:
            continue
        _train_row(row, results, callback, on_run)

        if row.runs:
            # The baseline is above in the table, so it has already run, unless the user left it
            # out.
            baseline = by_id[row.printed.baseline].runs if row.printed.baseline in by_id else []
            for name, value in measured_facts(row.runs, baseline).items():
                if name in row.figures:
                    row.figures[name] = row.figures[name]._replace(found=value)

        _write_page(results)
    _write_page(results)  # even if no row is trained
    return results


def _check_rows(results: Reproduction) -> None:
    """Raise `ConfigError` if a selected row cannot be run, or if `options.set` leaves no row to run."""
    options = results.options
    for row in results.rows:
        if row.recipe is None and options.rows is not None:
            message = f"cannot be run ({row.reason}); leave it out"
            raise ConfigError(message, setting="rows", value=row.printed.id)

    # Of the rows with a network; "" for one that can be run.
    reasons = [row.reason for row in results.rows if row.source]
    if options.set and reasons and all(reasons):
        raise ConfigError(f"no row can be run; {reasons[0]}", setting="set")


def _check_data(results: Reproduction) -> None:
    """Open the data, which all rows share, unless every run is finished; raise the error if this fails."""
    for row in results.rows:
        runs = [results.run_folder(row.printed.id, seed) for seed in range(results.seeds)]
        if row.recipe is not None and not all((run / _RESULT).is_file() for run in runs):
            open_data(row.recipe.data)
            return


def _train_row(
    row: ReproducedRow,
    results: Reproduction,
    callback: Callback | None,
    on_run: Callable[[str, int], None],
) -> None:
    """Train *row* with each seed that has no result yet; set `runs`, and `failure` if a seed fails."""
    for seed in range(results.seeds):
        folder = results.run_folder(row.printed.id, seed)
        recipe = read_recipe(row.source, results.overrides(row, seed))

        result = _read_result(folder / _RESULT, recipe)
        if result is None:
            on_run(row.printed.id, seed)
            try:
                trained = train_recipe(recipe, folder, resume="auto", callback=callback)
            except TrainingStoppedError:
                raise
            except SopdeployError as error:  # another row may be trained
                # If one of several processes has the error alone, it must not go on: it would add
                # values of its next row to sums of the others, which still train this row.
                if is_distributed() and not isinstance(error, TrainingError):
                    raise
                row.failure = f"seed {seed} failed: {error}"
                return

            result = measure_run(recipe, trained)
            _write(folder / _RESULT, result.model_dump_json() + "\n")
        row.runs.append(result)


def _read_result(path: Path, recipe: Recipe) -> SeedResult | None:
    """Read the result at *path* if there is one; raise `ConfigError` if it is not that of *recipe*."""
    if not path.is_file():
        return None
    try:
        values = parse_json(read_file(path, MAX_NAMES_BYTES))
        stored = SeedResult.model_validate(values)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); remove this file"
        ) from error
    except pydantic.ValidationError as error:
        raise ConfigError(
            f"{path}: not a result ({first_problem(error, values)}); remove this file"
        ) from error
    except ValueError as error:  # it is not JSON
        raise ConfigError(f"{path}: not a result ({error}); remove this file") from error

    if stored.recipe != recipe.model_dump(mode="json"):
        message = f"{path}: the row was trained with another recipe or other data; choose another folder"
        raise ConfigError(message, setting="out")
    return stored


def _write_page(results: Reproduction) -> None:
    _write(results.page, render_page(results))
    _write(results.folder / _RESULT, json.dumps(results.summary(), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write *text* to *path*, in the first process of torchrun only."""
    if is_main_process():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_text(text, encoding="utf-8")
