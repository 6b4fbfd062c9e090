"""`sopdeploy.train`, `sopdeploy train` and `sopdeploy recipes`."""

import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from sopdeploy.base.environment import is_main_process
from sopdeploy.base.files import LAST
from sopdeploy.base.project import RUNS
from sopdeploy.cli.command import as_data, command, expand_options
from sopdeploy.cli.console import ProgressBars, err, print_json, print_table, say
from sopdeploy.errors import ConfigError, amount
from sopdeploy.models.families import PAGE, find_family, names_of_family
from sopdeploy.training.settings.recipe_files import list_recipes, recipe_text
from sopdeploy_commands.train_dry_run import check_images, print_report, print_wrong_labels
from sopdeploy_commands.train_request import TrainOptions, read_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sopdeploy.bundle.decision import Decision
    from sopdeploy.data.folders.check import DataReport
    from sopdeploy.report.wrong_labels import WrongLabel
    from sopdeploy.training.callback import Callback, WarningRecord
    from sopdeploy.training.records.checkpoints import Setup
    from sopdeploy.training.records.results import ClassScore
    from sopdeploy.training.settings.recipe import Recipe
    from sopdeploy.training.setup import Given
    from sopdeploy.training.train import FinishedRun, TrainingResult
    from sopdeploy.weights.checkpoint import Checkpoint

MAX_CLASSES = 30  # that are printed; the report has all


def _show(result: "TrainingResult | DataReport | list[WrongLabel]", *, as_json: bool) -> None:
    """Print the result of a training run or, of a dry run, what it would read; then raise what is wrong with it."""
    from sopdeploy.data.folders.check import DataReport

    if as_json:
        print_json(as_data(result))
    elif isinstance(result, DataReport):
        print_report(result)
    elif isinstance(result, list):
        print_wrong_labels(result)
    else:
        print_result(result)
    if isinstance(result, DataReport):
        result.must_be_usable()


def print_result(result: "TrainingResult") -> None:
    """Print a table of the classes, the score, the decision, the report and the next command."""
    from sopdeploy.training.records.results import (  # imports numpy
        describe_notes,
        insert_folders,
    )

    _print_classes(result.classes)

    # The score, what was left out, calibration and rejection.
    lines = [
        insert_folders(line, result.data, result.out) for line in result.procedure.summary()
    ]
    if result.decision is not None:
        lines += _join_decision(result.decision)
    if result.previous:  # a text: which run it started from, and what was added since
        lines.append(result.previous)

    notes = len(describe_notes(result.procedure))
    report = f"report: {result.report}"
    if notes:
        report += f", with {amount(notes, 'note')} on your images"
    next_step = f"next: sopdeploy export {quote(str(result.best))} --detach"
    if result.problem:  # exporting the network would be of no use
        next_step = f"problem: {result.problem}"
    say(*lines, report, next_step)


def _print_classes(classes: "Sequence[ClassScore]") -> None:
    """Print precision and recall of *classes*; of more than `MAX_CLASSES`, those with the lowest recall."""
    shown = classes
    if len(classes) > MAX_CLASSES:
        with_recall = [row for row in classes if row.recall is not None]
        shown = sorted(with_recall, key=lambda row: row.recall or 0.0)[:MAX_CLASSES]
    rows = []
    for row in shown:
        shares = (
            "-" if share is None else f"{100 * share:.0f} %"
            for share in (row.precision, row.recall)
        )
        rows.append((row.label, str(row.images), *shares))
    if rows:
        print_table(("class", "images", "precision", "recall"), rows)


def _join_decision(decision: "Decision") -> list[str]:
    """Describe calibration and rejection in a line each, or the thresholds of several classes per image."""
    if decision.thresholds is not None:
        return [f"{name}: {text}" for name, text in decision.rows()]
    lines = []
    if decision.calibration is not None:
        lines.append("calibration: {} {}".format(*decision.calibration.row()))
    if decision.rejection is not None:
        lines.append("; ".join(f"{name}: {text}" for name, text in decision.rejection.rows()))
    return lines


@command(
    _show,
    options={"data", "recipe", "out"},
    distributed=True,
    examples=(
        "sopdeploy train --data photos/",
        "sopdeploy train --data photos/ --dry-run",
        "sopdeploy train --data photos/ --from bundles/live",
        "sopdeploy train --data photos/ --pretrained model.safetensors",
        "sopdeploy train --recipe digits-dsop --epochs 10",
        "sopdeploy train --recipe digits-plain --set model.config.pooling=isqrt",
    ),
)
@expand_options
def train(
    data: str | Path | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    *,
    options: TrainOptions,
    progress: bool | None = None,
    callback: "Callback | None" = None,
    **settings: Any,
) -> "TrainingResult | DataReport | list[WrongLabel]":
    """Train an image classifier on a folder of images with one subfolder per class.

    It prints the accuracy to expect on new images, and writes best.pt, which `sopdeploy export`
    converts, and report.html, which shows confusions and the worst mistakes. Ctrl-C and SIGTERM
    save and stop; `--resume always` continues bit for bit.

    Args:
        data: Folder of images, DIR/<class>/*.jpg; sets `data.path`.
        recipe: A recipe of `sopdeploy recipes`, or a .toml file; by default the recipe for photos.
        out: Folder of the run; by default runs/<project>-<number>. `runs/latest` links to it.
        progress: Print progress on stderr; by default only on a terminal and in a notebook.
        callback: Receives the events of the run, instead of the progress display.
        **settings: Values of the recipe, for example `epochs=5`, `optimizer={"lr": 0.1}` or
            `**{"optimizer.lr": 0.1}`. An empty dict adds an optional table with its defaults: `ema={}`.

    Returns:
        The files and metrics of the run; with `dry_run`, the content of the folder or the wrong labels.

    Raises:
        ConfigError: Unknown recipe or setting, an invalid value, or *out* holds another run.
        DataError: The images cannot be used.
        WeightsError: The pretrained weights cannot be downloaded or read, or belong to another network.
        TrainingError: A loss or gradient is not finite. `TrainingStoppedError`, a subclass, after Ctrl-C or
            SIGTERM; the run is saved before.

    Examples:
        >>> run = sopdeploy.train(data="photos")
        >>> run.best.name, run.num_classes
        ('best.pt', 6)
    """
    data = None if data is None else Path(data)
    out = None if out is None else Path(out)
    if options.wrong_labels is not None and not options.dry_run:
        raise ConfigError("only with dry_run", setting="wrong_labels")
    if options.dry_run and options.wrong_labels is not None:
        from sopdeploy.report.wrong_labels import find_wrong_labels

        return list(find_wrong_labels(Path(options.wrong_labels), data))
    if options.dry_run:
        return check_images(data, options.set, settings, lambda _done, _total: None)

    request = read_request(data, recipe, out, options, settings)

    from sopdeploy.report.page import PAGE, write_run_page
    from sopdeploy.training.callback import Callback, WarningRecord
    from sopdeploy.training.distributed import join_processes
    from sopdeploy.training.train import summarize_run
    from sopdeploy_commands.runs_page import list_runs_before, write_runs_page

    with ExitStack() as stack:
        stack.enter_context(join_processes())

        # The user's callback, bars on a terminal, or nothing.
        observer: Any = callback or Callback()
        shows_progress = (err.is_terminal or err.is_jupyter) if progress is None else progress
        draws_bars = callback is None and shows_progress and is_main_process()
        if draws_bars:
            observer = stack.enter_context(ProgressBars(err))
        observer = WarningRecord(observer)

        # The run. Of several processes, the first one alone writes the page.
        run, folder = _train_in_folder(request.recipe, request.given, out, options, observer)
        if not is_main_process():
            return summarize_run(run, folder)

        def on_image(done: int, total: int) -> None:
            observer.on_stage(name="report", done=done, total=total)

        runs_before = list_runs_before(folder, request.recipe.project)
        facts = write_run_page(run, folder, on_image, runs_before)
        if folder.parent.resolve() == RUNS.resolve():
            write_runs_page()

    result = summarize_run(
        run,
        folder,
        report=folder / PAGE,
        mistakes=tuple(facts.mistakes[:2]),  # the most frequent ones
        thresholds=facts.thresholds,
        classes=facts.classes,
        previous=""
        if request.previous is None
        else _describe_changes(request.previous, run.setup),
    )
    if draws_bars and err.is_jupyter:  # the command prints all of the result
        observer.on_message(result.procedure.describe_score())
    return result


def _train_in_folder(
    recipe: "Recipe",
    given: "Given",
    out: Path | None,
    options: TrainOptions,
    observer: "WarningRecord",
) -> "tuple[FinishedRun, Path]":
    """Train *recipe* in *out* or, without it, in the next folder `runs/NAME-N`; return the run and its folder."""
    from sopdeploy.training import tensorboard
    from sopdeploy.training.distributed import Strategy, TrainingStoppedError, select_device
    from sopdeploy.training.records.run_folder import numbered_folder
    from sopdeploy.training.train import train_run

    resume = options.resumes
    strategy = Strategy(select_device(recipe.device))
    user_callback = observer.callback
    while True:
        folder = out or numbered_folder(str(recipe.project), strategy, resume=bool(resume))
        if options.tensorboard:
            curves = folder / tensorboard.FOLDER
            observer.callback = tensorboard.TensorBoard(user_callback, curves)
        try:
            run = train_run(
                recipe,
                folder,
                given=given,
                resume=resume,
                callback=observer,
                strategy=strategy,
            )
        except TrainingStoppedError as stopped:
            if (folder / LAST).is_file():
                stopped.message += "; the same command with --resume always continues it"
            raise
        except ConfigError as error:
            # Another process was faster to take this number, so try the next one.
            has_lost_number = error.setting == "out" and out is None and not resume
            if not has_lost_number:
                raise
        else:
            if options.tensorboard and not (folder / tensorboard.FOLDER).exists():
                observer.on_message("no curves for TensorBoard: a frozen network has no epochs")
            return run, folder


def _describe_changes(before: "Checkpoint", setup: "Setup") -> str:
    """Say what the run *before* reached, and what *setup* adds; empty if it is not known."""
    from sopdeploy.training.records.results import read_result  # imports numpy

    result_before = read_result(before.training)
    origin = before.origin
    if result_before is None or origin is None:
        return ""

    new_classes = [name for name in setup.labels if name not in before.labels]
    lost_classes = [name for name in before.labels if name not in setup.labels]
    num_images = len(setup.data.train) if setup.origin is None else setup.origin.num_images
    added = num_images - origin.num_images
    new = f", new: {', '.join(new_classes)}" if new_classes else ""
    lost = f", no longer a class: {', '.join(lost_classes)}" if lost_classes else ""
    accuracy = dict(result_before.rows())["accuracy"]
    return (
        f"before, {origin.run}: {accuracy}; since then {amount(added, 'photo', '+')}{new}{lost}"
    )


@command(
    examples=(
        "sopdeploy recipes",
        "sopdeploy recipes gsop",
        "sopdeploy recipes digits-dsop",
    )
)
def recipes(name: str | None = None) -> None:
    """List the packaged recipes or the recipes of a family of networks, or print one recipe.

    Every training writes its own recipe, with all settings, to recipe.toml in the folder of the run.

    Args:
        name: A recipe, or a family of second-order networks: dsop, gsop, gmsop or isqrt. By default, all
            recipes are listed.

    Raises:
        ConfigError: It is neither a recipe nor a family.
    """
    names = list_recipes()
    if name is not None:
        family = find_family(name)
        if family is None:
            sys.stdout.write(recipe_text(name))
            return
        names = names_of_family(family, names)

    summaries = ((name, tomllib.loads(recipe_text(name))["summary"]) for name in names)
    print_table(("recipe", "summary"), summaries)
    say(
        f"{PAGE} describes the families of second-order networks",
        "`sopdeploy reproduce TABLE --dry-run` estimates the GPU hours of the papers' runs",
    )
