"""A run from its recipe to its result: started or resumed, and trained by the selected procedure.

A run that is stopped or killed at any time and then resumed on the same machine ends with the
weights of an uninterrupted one: bit for bit on a CPU with the same number of threads.
"""

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sopdeploy.base.config import StrictModel
from sopdeploy.base.files import BEST, HISTORY, LAST
from sopdeploy.bundle.decision import Decision
from sopdeploy.data.photos.file_checks import leave_out_unreadable, unreadable_images_error
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import ThresholdMetrics
from sopdeploy.html.notebook import notebook_table
from sopdeploy.training.callback import Callback, WarningRecord
from sopdeploy.training.distributed import Strategy, select_device
from sopdeploy.training.records.checkpoints import Fit, Setup, read_warnings
from sopdeploy.training.records.results import AnyProcedureResult, ClassScore, LoopResult
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.settings.recipe import Recipe
from sopdeploy.training.setup import NOTHING_GIVEN, Given, open_images, set_up_run
from sopdeploy.training.start_weights import StartReport
from sopdeploy.weights.checkpoint import Checkpoint

PREDICTIONS = "predictions.csv"  # of a run, written with its page
MAX_MATRIX = 30  # classes that a notebook shows as a matrix


class ImagePrediction(NamedTuple):
    """What a finished run predicts for an image that the score counts.

    `label` is its class, `confidence` the probability of the `predicted` one and `likelihood` that of its
    own. `known` is None without a threshold.
    """

    file: str
    label: str
    predicted: str
    confidence: float
    likelihood: float
    known: bool | None


class TrainingResult(StrictModel):
    """The files and metrics of a finished run.

    Attributes:
        data: The folder of the images, if the data source has one.
        best_top1: Accuracy of the best epoch on the held-out images, or else of the cross-validation; with
            several classes per image, `best_map` is set instead.
        seconds: Time of the run with all its resumptions.
        procedure: The procedure that trained, with the score to expect on new images.
        decision: Temperature and rejection threshold in `best`, if there were enough images, or the
            thresholds of a multi-label network.
        start: The report on the start weights; None for random weights.
        report: The page about the run, if one is written.
        warnings: What the user should know about the images and the result.
        previous: The run that it started from, and what was added since.
        mistakes: The two most frequent ones: true class, predicted class, number of images.
        thresholds: What thresholds on the confidence do to the images that the score counts.
        classes: Precision and recall of each class on these images.
        problem: Why the network is of no use, such as an accuracy at chance; empty if nothing is known.
    """

    out: Path
    data: Path | None = None
    best: Path
    last: Path
    history: Path
    model: str
    num_classes: int
    train_count: int
    held_out_count: int
    num_epochs: int
    best_epoch: int
    best_top1: float | None = None
    best_map: float | None = None
    seconds: float
    procedure: AnyProcedureResult
    decision: Decision | None = None
    start: StartReport | None = None
    report: Path | None = None
    warnings: tuple[str, ...] = ()
    previous: str = ""
    mistakes: tuple[tuple[str, str, int], ...] = ()
    thresholds: tuple[ThresholdMetrics, ...] = ()
    classes: tuple[ClassScore, ...] = ()
    problem: str = ""

    def predictions(self) -> list[ImagePrediction]:
        """Read what the run predicts for each image that its score counts; empty with several classes per image.

        Raises `OSError` if the run has no `predictions.csv`.
        """
        with (self.out / PREDICTIONS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and "predicted" not in rows[0]:
            return []
        known = {"true": True, "false": False}
        return [
            ImagePrediction(
                file=row["file"],
                label=row["label"],
                predicted=row["predicted"],
                confidence=float(row["confidence"]),
                likelihood=float(row["likelihood"]),
                known=known.get(row["known"]),
            )
            for row in rows
        ]

    def confusion(self) -> dict[str, dict[str, int]]:
        """Count the images of `predictions` by their class, then by the predicted class."""
        labels = [row.label for row in self.classes]
        counts = {label: dict.fromkeys(labels, 0) for label in labels}
        for one in self.predictions():
            counts[one.label][one.predicted] += 1
        return counts

    def _repr_html_(self) -> str:
        """Show the score and the confusion matrix in a notebook."""
        lines = [f"{self.best}; the report: {self.report}"]
        try:
            counts = self.confusion()
        except OSError:  # the run has been deleted, or wrote no page
            counts = {}
        is_matrix = len(counts) <= MAX_MATRIX and any(
            sum(row.values()) for row in counts.values()
        )
        if is_matrix:
            columns = ["class", *counts]
            rows: list[tuple[object, ...]] = [
                (label, *row.values()) for label, row in counts.items()
            ]
        else:
            columns = ["class", "images", "precision", "recall"]
            rows = [
                (row.label, str(row.images), _percent(row.precision), _percent(row.recall))
                for row in self.classes
            ]
        return notebook_table(
            self.procedure.describe_score(), columns, rows, lines=lines, shares=is_matrix
        )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


class FinishedRun(NamedTuple):
    """What a run was given, what it fitted, and how: the entry `training` of its `best.pt`."""

    setup: Setup
    fit: Fit
    record: Mapping[str, Any]


def train_recipe(recipe: Recipe, out_dir: Path, **options: Any) -> TrainingResult:
    """Train *recipe* with the *options* of `train_run`, and describe the run."""
    return summarize_run(train_run(recipe, out_dir, **options), out_dir)


def train_run(
    recipe: Recipe,
    out_dir: Path,
    *,
    resume: bool | Literal["auto"] = False,
    callback: Callback | None = None,
    strategy: Strategy | None = None,
    given: Given = NOTHING_GIVEN,
) -> FinishedRun:
    """Train *recipe* and write the run to *out_dir*.

    *resume* continues from `last.pt` in *out_dir*; "auto" does so if there is one. *callback*
    is used in the first process only. If a new run of one process meets a damaged or missing
    image, it begins again without all such images (`leave_out_unreadable`); other runs end with an
    error that names all. *strategy* defaults to the processes that torchrun started. *given* is
    what the caller knows already.

    Raises `ConfigError` and `DataError` for invalid input, `TrainingError` if a value is not
    finite, `TrainingStoppedError` after Ctrl-C or SIGTERM.
    """
    if strategy is None:
        strategy = Strategy(select_device(recipe.device))
    if callback is None or strategy.rank != 0:
        callback = Callback()
    record = callback if isinstance(callback, WarningRecord) else WarningRecord(callback)

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder = RunFolder(out_dir, strategy)

    try:
        last = folder.open(resume=resume)
        if last is None:  # before minutes of work, so that others take the next number
            folder.lock()

        # Both attempts use one list of files, so that a file that vanishes is noticed.
        images = given.images or open_images(recipe)
        given = given._replace(images=images)
        record.keep([] if last is None else read_warnings(last))
        setup = _set_up(recipe, folder, last, record, given)
        try:
            return _fit(setup, last, folder, record)
        except DataError as error:  # perhaps of a damaged or missing image
            if last is not None or strategy.world > 1:
                data = setup.data
                raise unreadable_images_error(error, data.train, data.held_out) from None
            readable = leave_out_unreadable(images.data, error)  # raises all other errors again

        # A new run begins again without the images that cannot be read.
        given = given._replace(images=images._replace(data=readable))
        setup = _set_up(recipe, folder, None, record, given)
        return _fit(setup, None, folder, record)
    finally:
        folder.unlock()


def _set_up(
    recipe: Recipe,
    folder: RunFolder,
    last: Checkpoint | None,
    record: WarningRecord,
    given: Given,
) -> Setup:
    """Set the run up; its *record* of warnings grows while it trains."""
    from sopdeploy.training.few_shot.groups import group_by_start  # noqa: PLC0415

    group_copies = partial(group_by_start, recipe, folder.strategy, given.weights)
    given = given._replace(group_copies=group_copies)
    setup = set_up_run(recipe, folder, last, record, given)
    return replace(setup, warnings=record.warnings)


def _fit(
    setup: Setup, last: Checkpoint | None, folder: RunFolder, callback: WarningRecord
) -> FinishedRun:
    """Train by the procedure of *setup*, from *last* or anew, into the locked *folder*."""
    if setup.uses_loop:
        from sopdeploy.training.loop.run import fit_loop  # noqa: PLC0415
        from sopdeploy.training.loop.state import LoopState, restore_loop  # noqa: PLC0415

        run = LoopState(setup)
        if last is not None:
            restore_loop(run, last, folder.last)  # the last check
        fit: Any = partial(fit_loop, run)
    elif setup.is_few_shot:
        from sopdeploy.training.few_shot.run import fit_few_shot  # noqa: PLC0415

        fit = partial(fit_few_shot, setup, last)
    else:
        from sopdeploy.training.fine_tune import fit_fine_tune  # noqa: PLC0415

        fit = partial(fit_fine_tune, setup, last)
    for line in setup.describe(is_new=last is None):
        callback.on_message(line)
    fitted, training = fit(folder, callback)

    # Those that the result has: of a rule that is weak, and of a run that was finished before.
    for warning in training.get("warnings", ()):
        callback.on_warning(warning)
    return FinishedRun(setup.without_seen(fitted.seen), fitted, training)


def summarize_run(run: FinishedRun, out_dir: Path, **page: Any) -> TrainingResult:
    """Describe a finished run; *page* has what the page tells, such as `report` and `classes`."""
    setup = run.setup
    fit = run.fit
    epoch = fit.result.epoch if isinstance(fit.result, LoopResult) else 1
    best = fit.position.history[epoch - 1]
    is_map = setup.activation == "sigmoid"

    return TrainingResult(
        out=out_dir,
        data=setup.recipe.data_folder,
        best=out_dir / BEST,
        last=out_dir / LAST,
        history=out_dir / HISTORY,
        model=fit.name,
        num_classes=len(setup.labels),
        train_count=len(setup.data.train),
        held_out_count=len(setup.data.held_out),
        num_epochs=fit.position.epoch,
        best_epoch=best.epoch,
        seconds=fit.position.seconds,
        procedure=fit.result,
        start=setup.weights,
        best_top1=None if is_map else best.metrics.score,
        best_map=best.metrics.score if is_map else None,
        decision=fit.decision,
        warnings=tuple(run.record.get("warnings", ())),
        problem=describe_problem(setup, fit),
        **page,
    )


def describe_problem(setup: Setup, fit: Fit) -> str:
    """Say why the network of a training loop is of no use: its accuracy is at chance; empty if it may be of use.

    At chance is an accuracy that always predicting the largest class reaches, too. A loss that is not
    finite has ended the run with a `TrainingError`.
    """
    if not isinstance(fit.result, LoopResult):
        return ""
    top1 = fit.result.top1
    counts = setup.data.held_out.class_counts()
    if top1 is None or top1.count == 0 or top1.share > counts.max() / counts.sum():
        return ""
    label = setup.data.held_out.labels[int(counts.argmax())]
    return (
        f"the accuracy is at chance: always predicting {label} is right for "
        f"{100 * counts.max() / counts.sum():.0f} %; train longer, or change optimizer.lr"
    )
