"""A run from its recipe to its result: started or resumed, and trained by the selected procedure.

A run that is stopped or killed at any time and then resumed on the same machine ends with the weights of an
uninterrupted one: bit for bit on a CPU with the same number of threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
import torch
from torch import Tensor

from sopdeploy.checkpoint import Checkpoint, build_classifier, is_state_dict
from sopdeploy.config import StrictModel, first_problem
from sopdeploy.data.base import LabeledImages, Split, describe_contradictions, hash_images
from sopdeploy.data.datasets.folder import open_any_images
from sopdeploy.data.held_out import (
    NONE,
    choose_held_out,
    divide,
    record_choice,
    recorded_choice,
)
from sopdeploy.data.sources import HoldOut, open_data
from sopdeploy.decision import Decision
from sopdeploy.errors import CheckpointError, ConfigError, DataError, shorten
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.project import SAMPLED, Origin, folder_name, utc_now
from sopdeploy.training.diagnostics import best_epoch
from sopdeploy.training.distributed import Strategy, check_divisible, select_device
from sopdeploy.training.recipe import (
    AnyProcedureConfig,
    AutoConfig,
    FewShotConfig,
    LoopConfig,
    Recipe,
    check_same_recipe,
    validate_recipe,
)
from sopdeploy.training.results import AnyProcedureResult, NetworkScore, read_result
from sopdeploy.training.run import Callback, Run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.start_weights import (
    InitialModel,
    StartReport,
    WeightSource,
    complete_preprocess,
    create_initial_model,
)

ONE_GROUP = (
    "all images are one group (copies of one photograph, or one folder), so the accuracy of the class cannot "
    "be measured; add different photographs"
)
MAX_HASHED = 50_000  # training images; hashing more delays the start by more than a minute
FEW_IMAGES = 10_000  # up to them, the few-shot procedure takes minutes on a CPU and 0.5 GB


class TrainingResult(StrictModel):
    """The files and metrics of a finished run.

    Attributes:
        best_top1: Accuracy on the images that select the epoch; with several classes per image, `best_map`
            is set instead.
        seconds: Time of the run with all its resumptions.
        procedure: The procedure that trained, with the score to expect on new images.
        decision: Temperature and rejection threshold in `best`, if there were enough images, or the
            thresholds of a multi-label network.
        start: The report on the start weights; None for random weights.
        report: The page about the run, if one is written.
        previous: The run that it started from, and what was added since.
        mistakes: The two most frequent ones: true class, predicted class, number of images.
        networks: Those that were compared, if there was a choice.
    """

    out: Path
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
    previous: str = ""
    mistakes: tuple[tuple[str, str, int], ...] = ()
    networks: tuple[NetworkScore, ...] = ()


def train_recipe(recipe: Recipe, out_dir: Path, **options: Any) -> TrainingResult:
    """Train *recipe* with the *options* of `train_run`, and describe the run."""
    return summarize_run(*train_run(recipe, out_dir, **options), out_dir)


def train_run(
    recipe: Recipe,
    out_dir: Path,
    *,
    resume: bool | Literal["auto"] = False,
    callback: Callback | None = None,
    strategy: Strategy | None = None,
    given: Sequence[str] = (),
    weights: WeightSource | None = None,
) -> tuple[Run, Split]:
    """Train *recipe* and write the run to *out_dir*; return the finished run and its images.

    *resume* continues from `last.pt` in *out_dir*; "auto" does so if there is one. *callback* is used in the
    first process only. *strategy* defaults to the processes that torchrun started. *given* are the recipe
    keys that the user has set; one that has no effect is a `ConfigError`. *weights* is the file of
    `start.weights`, if the caller has opened it.

    Raises `ConfigError` and `DataError` for invalid input, `TrainingError` if a loss, gradient or buffer is
    not finite, `TrainingStoppedError` after Ctrl-C or SIGTERM.
    """
    strategy = strategy or Strategy(select_device(recipe.device))
    if callback is None or strategy.rank != 0:
        callback = Callback()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder = RunFolder(out_dir, strategy)
    try:
        checkpoint = folder.open(resume=resume)
        run, data = start_or_resume(recipe, folder, checkpoint, callback, given=given, weights=weights)
        fit: Callable[[Any, Split, RunFolder, Callback], None]
        if isinstance(run.recipe.procedure, LoopConfig):
            from sopdeploy.training.loop.run import fit_loop as fit  # noqa: PLC0415
        else:
            from sopdeploy.training.few_shot.run import fit_few_shot as fit  # noqa: PLC0415
        fit(run, data, folder, callback)
        return run, data
    finally:
        folder.unlock()


def start_or_resume(
    recipe: Recipe,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    callback: Callback,
    *,
    given: Sequence[str] = (),
    weights: WeightSource | None = None,
) -> tuple[Run, Split]:
    """Create the run, or rebuild it from the *checkpoint* in *folder*, and open its data.

    All checks run before a file is written: for a resumed run by `save_derived_files` here, for a new one by
    its procedure. A new run's folder is locked here, a resumed one's by `folder.open`.
    """
    strategy = folder.strategy
    recorded = None  # the procedure of the run to resume
    if checkpoint is not None:
        recorded = validate_recipe(checkpoint.training.get("recipe", {}), str(folder.last)).procedure
    opened = open_data(recipe.data, callback.on_warning)
    selected = select_procedure(recipe, len(opened.train), recorded)
    division = divide_images(selected.recipe, opened, checkpoint, strategy)
    data = division.data
    uses_loop = isinstance(selected.recipe.procedure, LoopConfig)
    _check_data(selected.recipe, opened, division, callback)
    selected.recipe.check_effect(given)
    if uses_loop:
        check_divisible(selected.recipe, len(data.train), strategy.world)
    if checkpoint is None:
        initial = create_initial_model(selected.recipe, data.train.labels, strategy, weights)
        run = create_run(data.train, strategy, initial)
        folder.lock()
    else:
        run = resume_run(selected.recipe, data.train, strategy, checkpoint, folder.last)
    check_same_step(run, folder.path)
    run.file_hashes, run.held_out = division.file_hashes, division.held_out
    _record_origin(run, data, folder, checkpoint)
    side, next_epoch = run.recipe.preprocess.crop, run.position.epoch + 1
    resumed = ""
    if checkpoint is None:
        if run.start is not None:
            callback.on_message(run.start.describe())
    else:
        folder.save_derived_files(run)  # only now are files written
        if uses_loop and next_epoch <= run.recipe.epochs:
            resumed = f", resumed at epoch {next_epoch}"
    if selected.reason:
        callback.on_message(selected.reason)
    callback.on_message(
        f"{len(data.train)} training images, {len(data.held_out)} held out{resumed}; the network sees "
        f"{side} x {side} pixels"
    )
    return run, data


class Selection(NamedTuple):
    """The recipe with the config of the selected procedure, and why "auto" took few_shot."""

    recipe: Recipe
    reason: str = ""


def select_procedure(
    recipe: Recipe, num_images: int, recorded: AnyProcedureConfig | None = None
) -> Selection:
    """Select the procedure of *recipe* for *num_images* training images.

    "auto" selects the *recorded* procedure of a resumed run. In a new run, it selects `few_shot` for up to
    `FEW_IMAGES` training images if the network has a head for it and torchrun did not start the run, and else
    the training loop. Raises `ConfigError` if `few_shot` has no head for the network.
    """
    config = recorded if isinstance(recipe.procedure, AutoConfig) else recipe.procedure
    reason = ""
    if config is None:  # "auto" in a new run
        config = LoopConfig()
        can_be_few_shot = not torch.distributed.is_initialized() and _has_head(recipe)
        if can_be_few_shot and num_images <= FEW_IMAGES:
            config = FewShotConfig()
            size = f"there are at most {FEW_IMAGES:,} images"
            reason = f"few-shot procedure: {size}; procedure.kind=loop trains all weights"
    if isinstance(config, FewShotConfig):
        if torch.distributed.is_initialized():
            raise ConfigError("procedure few_shot: needs one process; start it without torchrun")
        entry(head_name(recipe.model.name))  # raises the error if there is no head
    return Selection(recipe.model_copy(update={"procedure": config}), reason)


class Division(NamedTuple):
    """The images of a run, and the tensors of `Run` about their files."""

    data: Split
    file_hashes: Tensor
    held_out: Tensor


def divide_images(
    recipe: Recipe, opened: Split, checkpoint: Checkpoint | None, strategy: Strategy
) -> Division:
    """Hold out images of *opened* if the procedure of *recipe* needs them and the source has none.

    A new run chooses them; the run of *checkpoint* has recorded its choice. The first process decides for
    all. It alone hashes the files, up to `MAX_HASHED`.
    """
    images, is_first = opened.train, strategy.rank == 0
    hashes = np.zeros(0, np.int64)
    if is_first and len(images) <= MAX_HASHED:
        hashes = hash_images(images)
    config, record = recipe.data, np.zeros((0, 2), np.int64)
    is_cross_validated = isinstance(recipe.procedure, FewShotConfig)
    if is_cross_validated or not isinstance(config, HoldOut) or len(opened.held_out):
        return Division(opened, torch.from_numpy(hashes), torch.from_numpy(record))
    choice = np.zeros(len(images), np.int64)
    if is_first:
        recorded = None if checkpoint is None else (checkpoint.resume or {}).get("held_out")
        if recorded is not None and len(recorded) and len(hashes):
            choice = recorded_choice(recorded.numpy(), hashes)
        else:
            choice = choose_held_out(images, hashes, config.hold_out, config.hold_out_seed)
        record = record_choice(choice, hashes)
    choice = strategy.all_reduce(torch.from_numpy(choice)).numpy()  # the others add zeros
    of_training_files = hashes[choice == NONE] if len(hashes) else hashes
    return Division(divide(opened, choice), torch.from_numpy(of_training_files), torch.from_numpy(record))


def open_held_out(recipe: Recipe, checkpoint: Checkpoint) -> LabeledImages:
    """Open the images that the run of *recipe*, whose `last.pt` is *checkpoint*, held out."""
    opened = open_data(recipe.data)
    selected = select_procedure(recipe, len(opened.train)).recipe
    return divide_images(selected, opened, checkpoint, Strategy(torch.device("cpu"))).data.held_out


def _has_head(recipe: Recipe) -> bool:
    """Check whether the few-shot procedure has a head for the network."""
    try:
        entry(head_name(recipe.model.name))
    except ConfigError:
        return False
    return True


def _check_data(recipe: Recipe, opened: Split, division: Division, callback: Callback) -> None:
    """Check the images before the training.

    Warns of the classes of which no image could be held out, if *division* has images held out of *opened*,
    and of equal files with different labels. Raises `ConfigError` or `DataError` if `rejection.unknown` could
    not be used after the training.
    """
    data, file_hashes = division.data, division.file_hashes.numpy()
    if len(file_hashes) and (warning := describe_contradictions(data.train, file_hashes)):
        callback.on_warning(warning)
    were_held_out_here = len(data.held_out) and not len(opened.held_out)
    if were_held_out_here:
        counts = data.held_out.class_counts().tolist()
        missing = [label for label, count in zip(data.held_out.labels, counts, strict=True) if not count]
        if missing:
            callback.on_warning(f"{shorten(missing)}: {ONE_GROUP}")
    if recipe.rejection.unknown is not None:
        if data.train.targets.ndim == 2:
            raise ConfigError(
                "rejection.unknown: without effect where images have several classes; remove it"
            )
        open_any_images(recipe.rejection.unknown)


def _record_origin(run: Run, data: Split, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Set the origin of the *run*, which may continue *checkpoint*.

    The first process alone writes files, so the others may have other ids of the run.
    """
    before = None if checkpoint is None else checkpoint.origin
    data_path = getattr(run.recipe.data, "path", None)  # some data sources have none
    run.origin = Origin(
        run=folder_name(folder.path),
        run_id=token_hex(6) if before is None else before.run_id,
        started=utc_now() if before is None else before.started,
        data=run.recipe.data.kind if data_path is None else folder_name(data_path),
        num_images=len(data.train) + len(data.held_out),
        num_classes=len(run.labels),
        sample=run.image_hashes[:SAMPLED].tolist(),  # the lowest, as they are sorted
    )


def create_run(images: LabeledImages, strategy: Strategy, initial: InitialModel) -> Run:
    """Create a run that trains *initial* on *images*, of the class that the procedure of its recipe needs.

    Raises `DataError` for a single image, `ConfigError` for settings that do not fit images or network.
    """
    if len(images) < 2:
        raise DataError("there is only one training image; add another, a step needs two")
    run_class = Run
    if isinstance(initial.recipe.procedure, LoopConfig):
        from sopdeploy.training.loop.state import LoopRun  # noqa: PLC0415 # other procedures do not need it

        run_class = LoopRun
    return run_class(
        recipe=initial.recipe,
        labels=images.labels,
        activation="sigmoid" if images.targets.ndim == 2 else "softmax",
        train_count=len(images),
        strategy=strategy,
        name=initial.recipe.model.name,
        model=initial.model,
        start=initial.start,
    )


def check_same_step(run: Run, folder: Path) -> None:
    """Raise `ConfigError`, in at least one process, if the processes would resume from different steps."""
    position = torch.tensor([run.position.epoch, run.position.step])
    # If positions differ, at least one differs from their mean; its multiple is then not their sum.
    if not torch.equal(run.strategy.all_reduce(position), position * run.strategy.world):
        raise ConfigError(
            f"{folder}: the processes find different checkpoints; use a disk that all machines share"
        )


def resume_run(
    recipe: Recipe, images: LabeledImages, strategy: Strategy, checkpoint: Checkpoint, source: Path
) -> Run:
    """Rebuild the run of *checkpoint*, read from *source*.

    Raises `ConfigError` if the recipe changed, `DataError` if the data changed, and `CheckpointError` if the
    checkpoint has no valid state to resume from.
    """
    recipe = complete_preprocess(recipe, checkpoint.preprocess)
    check_same_recipe(recipe, checkpoint.training.get("recipe", {}), source)
    state = checkpoint.resume
    if state is None:
        raise CheckpointError(f"{source}: has no state to resume from; start a new run in another folder")
    _check_same_images(checkpoint.labels, state.get("train_count"), images, source)
    damaged = CheckpointError(f"{source}: its state to resume from is damaged; start a new run")
    weights: Any = state.get("weights")  # the raw ones; those of the checkpoint may be averages
    if not is_state_dict(weights):
        raise damaged
    model = build_classifier(replace(checkpoint, weights=weights), source)
    try:
        start = checkpoint.training.get("start")
        initial = InitialModel(model, recipe, None if start is None else StartReport.model_validate(start))
        run = create_run(images, strategy, initial)
        run.name = checkpoint.model  # after a few-shot run, this is `head:` and the name in the recipe
        run.result = read_result(checkpoint.training)
        is_finished = run.result is not None  # otherwise the checkpoint has default thresholds
        run.decision = checkpoint.decision if is_finished else None
        run.load_resume_state(state)
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}; start a new run") from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise damaged from error
    return run


def _check_same_images(labels: tuple[str, ...], count: Any, images: LabeledImages, source: Path) -> None:
    """Raise `DataError` unless *images* have the *labels* and the *count* of the run in *source*."""
    if labels != images.labels:
        raise DataError(f"{source}: the run started with the classes {shorten(labels)}; give the same data")
    if count != len(images):
        raise DataError(
            f"{source}: the run started with {count} training images, now there are {len(images)}; give the "
            "same data or start a new run"
        )


def summarize_run(run: Run, data: Split, out_dir: Path) -> TrainingResult:
    """Describe the finished *run*; `report`, `previous`, `mistakes` and `networks` are left empty."""
    history = run.position.history
    best = best_epoch(history, frozen_backbone=run.recipe.frozen_backbone)
    return TrainingResult(
        out=out_dir,
        best=out_dir / "best.pt",
        last=out_dir / "last.pt",
        history=out_dir / "history.csv",
        model=run.name,
        num_classes=len(run.labels),
        train_count=run.train_count,
        held_out_count=len(data.held_out),
        num_epochs=run.position.epoch,
        best_epoch=best.epoch,
        seconds=run.position.seconds,
        procedure=run.result,
        start=run.start,
        **{"best_map" if run.activation == "sigmoid" else "best_top1": best.metrics.score},
        decision=run.decision,
    )
