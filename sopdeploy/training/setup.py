"""The start of a run: what it was given, after all checks, before a file is written."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.base.project import FolderReading, Origin, folder_name, utc_now
from sopdeploy.bundle.decision import Rejection
from sopdeploy.data.photos.any_images import UnknownImages, open_unknown
from sopdeploy.data.photos.clips import clips_of_images
from sopdeploy.data.photos.copies import NO_PAIRS, Grouped, Groups, connect, group_photographs
from sopdeploy.data.photos.file_checks import (
    count_formats,
    describe_contradictions,
    find_seen,
    hash_images,
)
from sopdeploy.data.photos.photo import LabeledImages, Split
from sopdeploy.data.photos.split import (
    NONE,
    Record,
    choose_held_out,
    divide,
    record_choice,
    recorded_choice,
)
from sopdeploy.data.sources import HoldOut, open_data
from sopdeploy.errors import (
    ConfigError,
    DataError,
    amount,
    describe_known,
    is_memory_exhausted,
    shorten,
)
from sopdeploy.evaluation.metrics import NO_IMAGES
from sopdeploy.images.limits import EXTRAS, missing_extra
from sopdeploy.layers.normalize import IMAGES_FORMAT
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.callback import Callback
from sopdeploy.training.checkpoints import (
    Setup,
    has_same_images,
    read_held_out,
    read_left_out,
    read_recorded_recipe,
    read_resumed,
)
from sopdeploy.training.distributed import Strategy, check_batch_size
from sopdeploy.training.head_settings import FewShotConfig, FineTuneConfig, HeadOptions
from sopdeploy.training.recipe import (
    AnyProcedureConfig,
    AutoConfig,
    LoopConfig,
    Recipe,
    check_same_recipe,
)
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.start_weights import (
    WeightSource,
    complete_preprocess,
    create_initial_model,
)
from sopdeploy.weights.checkpoint import Checkpoint, build_classifier

ONE_GROUP = (
    "all images are one group (they look alike, or are in one folder), or share "
    "groups with other classes, so the accuracy of the class cannot be measured; "
    "add different photos"
)
MAX_HASHED = 50_000  # images of a part; reading more delays the start by more than a minute
FEW_IMAGES = 100_000  # up to them, the few-shot procedure keeps 1.8 GB (18 kB per image)
LOOP_INSTEAD = "procedure.kind=loop trains the whole network"
FEW_SHOT_INSTEAD = "procedure.kind=few_shot fits a linear classifier to the frozen network"


GroupCopies = Callable[[LabeledImages], Grouped]


class Division(NamedTuple):
    """The images of a run; arrays are empty for what it does not hold out or hash.

    `file_hashes` (N,) are those of the training images in their order, `held_out` is a
    `Record`. `num_seen` is the number of held-out images that are training images, too, and are
    judged all the same, because a class would lose all of its held-out images.
    """

    data: Split
    file_hashes: NDArray[np.int64]
    held_out: Record
    num_seen: int = 0


class RunImages(NamedTuple):
    """The images of a run: the data, and those of none of the classes, which test the rejection."""

    data: Split
    unknown: UnknownImages | None = None


class Given(NamedTuple):
    """What the caller of a run knows: recipe `keys` that the user has set, and what is opened already.

    `rule_before` is that of the run to start from, which rejects unknown images. `group_copies`
    finds the copies among images of which the run holds some out.
    """

    keys: Sequence[str] = ()
    weights: WeightSource | None = None
    images: RunImages | None = None
    rule_before: Rejection | None = None
    group_copies: GroupCopies = group_photographs


NOTHING_GIVEN = Given()


def open_images(
    recipe: Recipe, data: Split | None = None, unknown: UnknownImages | None = None
) -> RunImages:
    """Open the images of *recipe*; *data* and *unknown* are those that are open already.

    Raises the errors of `open_data`, and `DataError` for the folder of unknown images.
    """
    folder = recipe.rejection.unknown
    if unknown is None and folder is not None:
        unknown = open_unknown(folder)
    return RunImages(open_data(recipe.data) if data is None else data, unknown)


def set_up_run(
    recipe: Recipe,
    folder: RunFolder,
    last: Checkpoint | None,
    callback: Callback,
    given: Given = NOTHING_GIVEN,
) -> Setup:
    """Open the data and the network of a new run, or of the run of *last* in *folder*; writes no file.

    *given* is what the caller knows already; *callback* receives warnings. Raises `ConfigError`
    if the recipe changed, `DataError` if the data cannot be used or changed, and
    `CheckpointError` if *last* has no valid state to resume from.
    """
    strategy = folder.strategy
    recorded = None if last is None else read_recorded_recipe(last, folder.last)
    opened, unknown = given.images or open_images(recipe)
    if last is not None:
        opened = opened.without(read_left_out(last, folder.last))

    for note in opened.notes:
        callback.on_warning(note)

    # The procedure, the images that train and those that are held out, and the network.
    selected, reason = select_procedure(
        recipe, len(opened.train), None if recorded is None else recorded.procedure
    )
    is_automatic = isinstance(recipe.procedure, AutoConfig)
    if not is_automatic:
        selected.check_effect(given.keys, holds_out=not len(opened.held_out))

    if last is None or recorded is None:
        division = _divide_and_check(selected, opened, last, folder, callback, given)
        setup = new_setup(selected, division, strategy, given.weights)
        if parts := setup.name_random_frozen_parts():
            problem = f"{parts} of the frozen network would stay random; {LOOP_INSTEAD}"
            if "procedure.kind" in given.keys:
                raise ConfigError(f"procedure {selected.procedure.kind}: {problem}")
            if not is_automatic:  # a recipe names the procedure
                callback.on_warning(problem)
            else:  # what starts random must be trained
                selected = selected.model_copy(update={"procedure": LoopConfig()})
                reason = f"training loop, because {parts} would stay random in a frozen network"
                division = _divide_and_check(selected, opened, last, folder, callback, given)
                setup = new_setup(selected, division, strategy, given.weights)
    else:
        division = _divide_and_check(selected, opened, last, folder, callback, given)
        setup = _resume_setup(selected, recorded, division, folder, last)

    if is_automatic:  # the network has decided now, too
        selected.check_effect(given.keys, holds_out=not len(opened.held_out))
    if unknown is not None and unknown.note:
        callback.on_warning(unknown.note)
    check_same_step(setup, folder)

    # Only the first process writes the formats of the images, so it alone counts them.
    formats = _find_formats(setup.data, callback) if strategy.rank == 0 else []
    origin = _describe_origin(setup, opened.reading, folder, last, formats)
    unknown_images = None if unknown is None else unknown.images
    return replace(
        setup,
        reason=reason,
        origin=origin,
        unknown=unknown_images,
        rule_before=given.rule_before,
    )


def _divide_and_check(
    selected: Recipe,
    opened: Split,
    last: Checkpoint | None,
    folder: RunFolder,
    callback: Callback,
    given: Given,
) -> Division:
    """Divide the images *opened* for the procedure of *selected*; raises `DataError` if they do not suffice."""
    strategy = folder.strategy
    division = divide_images(selected, opened, last, strategy, given.group_copies)
    _check_data(selected, opened, division, given.keys, callback)
    if isinstance(selected.procedure, LoopConfig):
        division = _leave_out_seen(division, len(opened.held_out), strategy, callback)
        check_batch_size(selected, len(division.data.train), strategy.world)
    return division


def _find_formats(data: Split, callback: Callback) -> list[str]:
    """List the formats of the images, sorted; warn of those that a server reads only with an extra."""
    formats = count_formats(data.train) + count_formats(data.held_out)
    for name in formats.keys() & EXTRAS:
        if missing_extra(name):
            continue  # the first image says so
        extra, _ = EXTRAS[name]
        callback.on_warning(
            f"{amount(formats[name], 'image')} in {name.upper()}: install "
            f"sopdeploy[{extra}] also where the network is served"
        )
    return sorted(formats)


def new_setup(
    recipe: Recipe, division: Division, strategy: Strategy, weights: WeightSource | None = None
) -> Setup:
    """Build the network of *recipe* with its start weights; *weights* is their file, if it is known.

    Raises `DataError` for a single image, `ConfigError` for settings that do not fit images or
    network, and the errors of `create_initial_model`.
    """
    check_count(division.data.train)
    model, recipe, report = create_initial_model(
        recipe, division.data.train.labels, strategy, weights
    )
    placed = move_to_device(recipe, model, strategy)

    return Setup(
        **division._asdict(), recipe=recipe, strategy=strategy, model=placed, weights=report
    )


def _resume_setup(
    recipe: Recipe, recorded: Recipe, division: Division, folder: RunFolder, last: Checkpoint
) -> Setup:
    """Set up the run of *last* again; *recorded* is the recipe with which it began.

    Raises an error if *recipe* differs from it in more than `CHANGEABLE_KEYS`, or if the images
    are known to be others than those with which the run began.
    """
    source = folder.last
    images = division.data.train
    recipe = complete_preprocess(recipe, last.preprocess)
    check_same_recipe(recipe, recorded, source)

    # The run must continue with the images, the classes and the order in which it began.
    state = read_resumed(last, source)
    if last.labels != images.labels:
        classes = shorten(last.labels)
        raise DataError(
            f"{source}: the run started with the classes {classes}; give the same data"
        )
    if state.train_count != len(images):
        raise DataError(
            f"{source}: the run started with {state.train_count} training "
            f"images, now there are {len(images)}; give the same data or "
            "start a new run"
        )
    if not has_same_images(last, source, images, division.file_hashes):
        raise DataError(
            f"{source}: training images, their order or labels have changed since "
            "the run started; give the same data or start a new run"
        )

    check_count(images)

    # The run goes on with the raw weights. Those of *last* itself may be averages of them.
    resumed = replace(last, weights=state.weights)
    model = move_to_device(recipe, build_classifier(resumed, source), folder.strategy)

    return Setup(
        **division._asdict(),
        recipe=recipe,
        strategy=folder.strategy,
        model=model,
        weights=state.start_weights,
        position=state.position,
    )


class Selected(NamedTuple):
    """A recipe with the selected procedure, and why "auto" selected it; empty if it did not."""

    recipe: Recipe
    reason: str


def select_procedure(
    recipe: Recipe, num_images: int, recorded: AnyProcedureConfig | None = None
) -> Selected:
    """Select the procedure of *recipe* for *num_images* training images.

    "auto" selects the *recorded* procedure of a resumed run. In a new run, it selects `few_shot`
    if all of these hold, otherwise the training loop:

    - the network has start weights,
    - it has no part that is used in training only, such as DSoP's branches, which a frozen network lacks,
    - there is a head for it,
    - there are at most `FEW_IMAGES` training images,
    - torchrun did not start the run.

    Raises `ConfigError` for `few_shot` and `fine_tune` if there is no head for the network, or
    if torchrun started the run.
    """
    config: AnyProcedureConfig = LoopConfig()
    reason = ""

    # The procedure that the recipe names, that of the resumed run, or a choice.
    if not isinstance(recipe.procedure, AutoConfig):
        config = recipe.procedure
    elif recorded is not None:
        config = recorded
    elif recipe.starts_random:
        reason = (
            "training loop, because the network starts from random weights, which all learn"
        )
    elif parts := entry(recipe.model.name).network.training_only:
        reason = (
            f"training loop, because {shorten(parts)} of {recipe.model.name} must be trained; "
            "procedure.kind=few_shot leaves them out"
        )
    elif not has_head(recipe):
        reason = f"training loop, because {recipe.model.name} has no linear classifier for frozen features"
    elif num_images > FEW_IMAGES:
        reason = f"training loop, for more than {FEW_IMAGES:,} images; {FEW_SHOT_INSTEAD}"
    elif torch.distributed.is_initialized():
        reason = "training loop, because torchrun started the run"
    else:
        config = FewShotConfig()
        reason = (
            f"linear classifier on frozen features (few_shot), for up to {FEW_IMAGES:,} images; "
            f"{LOOP_INSTEAD}"
        )

    if isinstance(config, HeadOptions):
        if torch.distributed.is_initialized():
            raise ConfigError(
                f"procedure {config.kind}: needs one process; start it without torchrun"
            )
        entry(head_name(recipe.model.name))  # raises the error if there is no head

    return Selected(recipe.model_copy(update={"procedure": config}), reason)


def has_head(recipe: Recipe) -> bool:
    """Check whether the few-shot procedure has a head for the network."""
    try:
        entry(head_name(recipe.model.name))
    except ConfigError:
        return False
    return True


def divide_images(
    recipe: Recipe,
    opened: Split,
    last: Checkpoint | None,
    strategy: Strategy,
    group_copies: GroupCopies = group_photographs,
) -> Division:
    """Hold out images of *opened* if the procedure of *recipe* needs them and the source has none.

    A new run chooses them. The run of *last* has recorded its choice; for more than `MAX_HASHED`
    images, it chooses again, with the same result. The first process decides for all, and alone
    reads the files, each once, and calls *group_copies*.
    """
    images = opened.train
    config = recipe.data
    hashes = np.zeros(0, np.int64)  # of no file
    record = np.zeros((0, 2), np.int64)

    # The few-shot procedure holds out nothing. A new run hashes the files with their features.
    if isinstance(recipe.procedure, FewShotConfig):
        return Division(opened, hashes if last is None else hash_images(images), record)
    reads_files = strategy.rank == 0 and len(images) <= MAX_HASHED
    if not isinstance(config, HoldOut) or len(opened.held_out):
        return Division(opened, hash_images(images) if reads_files else hashes, record)

    # The first process chooses, by hashes and groups, so that copies stay on one side.
    choice = np.zeros(len(images), np.int64)
    if strategy.rank == 0:
        recorded = None if last is None else read_held_out(last)
        if reads_files and recorded is not None:
            hashes = hash_images(images)
            choice = recorded_choice(recorded, hashes)
        else:
            groups = connect(len(images), NO_PAIRS, images.groups)
            if reads_files:
                groups, hashes = _group_and_hash(recipe, images, group_copies)
            choice = choose_held_out(images, groups, config.hold_out, config.hold_out_seed)
        record = record_choice(choice, hashes)

    # The other processes add zeros to the choice of the first one.
    choice = strategy.all_reduce(torch.from_numpy(choice)).numpy()
    of_training_files = hashes[choice == NONE] if len(hashes) else hashes
    return Division(divide(opened, choice), of_training_files, record)


def _group_and_hash(
    recipe: Recipe, images: LabeledImages, group_copies: GroupCopies
) -> tuple[Groups, NDArray[np.int64]]:
    """Read the files of *images*; return the groups (N,) of copies and clips, and the hashes (N,)."""
    copies = group_copies(images)
    if recipe.groups_by_name:
        return copies.groups, copies.file_hashes
    clips = clips_of_images(images, copies.times, copies.vectors, copies.groups)
    return clips.groups, copies.file_hashes


def open_division(recipe: Recipe, last: Checkpoint, source: Path) -> Division:
    """Open the images of the run of *recipe*, whose `last.pt` is *last*, read from *source*, as it divided them.

    Images that it left out are left out again.
    """
    opened = open_data(recipe.data).without(read_left_out(last, source))
    selected, _ = select_procedure(recipe, len(opened.train))
    return divide_images(selected, opened, last, Strategy(torch.device("cpu")))


def _check_data(
    recipe: Recipe, opened: Split, division: Division, keys: Sequence[str], callback: Callback
) -> None:
    """Check the images before the training; raises errors that would otherwise come after it.

    *opened* is what the source has, *division* what trains and is held out; *keys* are the recipe
    keys that the user has set.
    """
    data = division.data
    file_hashes = division.file_hashes
    if data.train.is_multi_label:
        if isinstance(recipe.procedure, FineTuneConfig):
            raise ConfigError(
                "procedure fine_tune: compares predictions, which needs one class per "
                "image; choose few_shot"
            )

        ignored = {key for key in keys if key.startswith("rejection.")}
        if recipe.rejection.unknown is not None:
            ignored.add("rejection.unknown")
        if ignored:
            names = ", ".join(sorted(ignored))
            raise ConfigError(f"{names}: not used where images have several classes; remove it")

    # Without hashes, the few-shot procedure warns later, when it has read the files; a loop of
    # more than `MAX_HASHED` images does not warn.
    if warning := describe_contradictions(data.train, file_hashes):
        callback.on_warning(warning)

    # Classes of which nothing could be held out have no score.
    if not len(opened.held_out) and not isinstance(recipe.procedure, FewShotConfig):
        counts = data.held_out.class_counts().tolist()
        missing = [
            label
            for label, count in zip(data.held_out.labels, counts, strict=True)
            if not count
        ]
        problem = NO_IMAGES
        if isinstance(recipe.data, HoldOut):  # the run itself has held out images
            problem = f"{shorten(missing)}: {ONE_GROUP}"
        if not any(counts) and isinstance(recipe.procedure, LoopConfig):
            raise DataError(problem)
        if missing:
            callback.on_warning(problem)


def _leave_out_seen(
    division: Division, num_opened: int, strategy: Strategy, callback: Callback
) -> Division:
    """Leave held-out files that are training files, too, out of the *division* of a training loop, and warn.

    Without them, a class may have no held-out image; then they are judged all the same, because
    a loop has no other images to judge it. Images that the run itself holds out, without
    *num_opened* held-out images of the source, are not compared: their copies are held out, too.
    More than `MAX_HASHED` images are not compared, either.
    """
    held_out = division.data.held_out
    if not 0 < num_opened <= MAX_HASHED:
        return division

    # The first process alone reads the files; the other ones add zeros.
    seen = np.zeros(len(held_out), np.int64)
    if len(division.file_hashes):
        seen = find_seen(held_out, division.file_hashes).astype(np.int64)
    is_seen = strategy.all_reduce(torch.from_numpy(seen)).numpy() > 0
    if not is_seen.any():
        return division

    rest = division.data.without_held_out(is_seen)
    number = f"{int(is_seen.sum())} of {len(held_out)} validation images are training images"
    listed = "`sopdeploy train --data FOLDER --dry-run` lists them"
    if not len(rest.held_out):
        callback.on_warning(f"{number}, so that the score is too high for new images; {listed}")
        return division._replace(num_seen=int(is_seen.sum()))
    callback.on_warning(f"{number}, so they are not judged; {listed}")
    return division._replace(data=rest)


def check_count(images: LabeledImages) -> None:
    """Raise `DataError` unless there are at least two training images."""
    if len(images) < 2:
        raise DataError("there is only one training image; add another, a step needs two")


def check_same_step(setup: Setup, folder: RunFolder) -> None:
    """Raise `ConfigError`, in at least one process, if the processes would resume from different steps."""
    position = torch.tensor([setup.position.epoch, setup.position.step])
    # If positions differ, at least one differs from their mean. The multiple of this one by the
    # number of processes is not the sum of all.
    if not torch.equal(setup.strategy.all_reduce(position), position * setup.strategy.world):
        raise ConfigError(
            f"{folder.path}: the processes find different checkpoints; use a disk "
            "that all machines share"
        )


def _describe_origin(
    setup: Setup,
    reading: FolderReading,
    folder: RunFolder,
    last: Checkpoint | None,
    formats: Sequence[str],
) -> Origin:
    """Describe where the run in *folder*, on images in *formats*, comes from; it may continue *last*.

    *reading* says how the folder of the images was read.
    """
    before = None if last is None else last.origin
    data_path = setup.recipe.data_folder

    return Origin(
        num_classes=len(setup.labels),
        run=folder_name(folder.path),
        run_id=token_hex(6) if before is None else before.run_id,
        started=utc_now() if before is None else before.started,
        data=setup.recipe.data.kind if data_path is None else folder_name(data_path),
        num_images=len(setup.data.train) + len(setup.data.held_out),
        sample=(),  # the record adds it
        formats=tuple(formats),
        reading=reading,
    )


def move_to_device(recipe: Recipe, model: Classifier, strategy: Strategy) -> Classifier:
    """Move *model* to the device, in eval mode, and note the layout of its images.

    Raises `ConfigError` if it cannot compute the images of *recipe*.
    """
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    placed: Classifier = model.to(strategy.device, memory_format=layout)  # type: ignore[call-overload]
    sides = {recipe.preprocess.crop, recipe.training_crop}
    what = f"preprocess.crop: {recipe.model.name}"
    vars(placed)[IMAGES_FORMAT] = find_images_format(
        sides, placed, strategy.device, what, recipe.preprocess.channels
    )
    return placed


@torch.no_grad()
def find_images_format(
    sides: Collection[int],
    model: Classifier,
    device: torch.device,
    what: str,
    channels: int = 3,
) -> torch.memory_format:
    """Put *model* into eval mode and run it on zeros of all *sides*; return the layout of its images.

    The images have so many *channels*.

    This is channels-last, the faster one, unless *model* needs contiguous images, as `view`
    behind a convolution does. Raises `ConfigError` about *what* if no layout fits all sides.
    """
    model.eval()
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            for side in sides:
                image = torch.zeros(1, channels, side, side, device=device)
                model(image.to(memory_format=layout))
        except RuntimeError as error:
            if is_memory_exhausted(error):
                raise
            failure = error
            failed_side = side
        else:
            return layout

    advice = describe_known(failure) or "choose another size"
    raise ConfigError(
        f"{what} cannot compute images of {failed_side} pixels; {advice}"
    ) from failure
