"""The start of a run: what it was given, after all checks, before a file is written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from secrets import token_hex
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from sopdeploy.base.project import FolderReading, Origin, folder_name, utc_now
from sopdeploy.bundle.decision import Rejection
from sopdeploy.data.photos.any_images import UnknownImages, open_unknown
from sopdeploy.data.photos.copies import group_photographs
from sopdeploy.data.photos.file_checks import count_formats
from sopdeploy.data.photos.photo import Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, DataError, amount, shorten
from sopdeploy.images.limits import EXTRAS, missing_extra
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.callback import Callback
from sopdeploy.training.device import move_to_device
from sopdeploy.training.distributed import Strategy, check_batch_size
from sopdeploy.training.division import (
    Division,
    GroupCopies,
    check_count,
    check_data,
    divide_images,
    leave_out_deciding,
    leave_out_seen,
)
from sopdeploy.training.procedure import LOOP_INSTEAD, select_procedure
from sopdeploy.training.records.checkpoints import (
    Setup,
    has_same_images,
    read_left_out,
    read_recorded_recipe,
    read_resumed,
)
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.settings.recipe import (
    AutoConfig,
    FewShotRecipe,
    LoopConfig,
    LoopRecipe,
    Recipe,
    change_recipe,
    check_same_recipe,
)
from sopdeploy.training.start_weights import (
    WeightSource,
    complete_preprocess,
    create_initial_model,
)
from sopdeploy.weights.checkpoint import Checkpoint, build_classifier


class RunImages(NamedTuple):
    """The images of a run: the data, and those of none of the classes, which test the rejection."""

    data: Split
    unknown: UnknownImages | None = None


class Given(NamedTuple):
    """What the caller of a run knows: the user's `changes` of the recipe by dotted key, and what is opened already.

    `rule_before` is that of the run to start from, which rejects unknown images. `group_copies`
    finds the copies among images of which the run holds some out.
    """

    changes: Mapping[str, Any] = MappingProxyType({})
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
        check_effect(selected, opened, given.changes)

    if last is None or recorded is None:
        division = _divide_and_check(selected, opened, last, folder, callback, given)
        setup = new_setup(selected, division, strategy, given.weights)
        if parts := setup.name_random_frozen_parts():
            problem = f"{parts} of the frozen network would stay random; {LOOP_INSTEAD}"
            if "procedure.kind" in given.changes:
                raise ConfigError(f"procedure {selected.procedure.kind}: {problem}")
            if not is_automatic:  # a recipe names the procedure
                callback.on_warning(problem)
            else:  # what starts random must be trained
                selected = recipe.model_copy(update={"procedure": LoopConfig()})
                reason = f"training loop, because {parts} would stay random in a frozen network"
                division = _divide_and_check(selected, opened, last, folder, callback, given)
                setup = new_setup(selected, division, strategy, given.weights)
    else:
        division = _divide_and_check(selected, opened, last, folder, callback, given)
        setup = _resume_setup(selected, recorded, division, folder, last)

    if is_automatic:  # the network has decided now, too
        check_effect(selected, opened, given.changes)
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


def check_effect(recipe: Recipe, opened: Split, changes: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for *changes* of the user, by key, without effect on the run of *recipe*."""
    unused: list[str] = []
    is_few_shot = isinstance(recipe, FewShotRecipe)
    if is_few_shot:
        # Settings of a loop, if "auto" selected this procedure after they were read.
        selected = ("procedure.kind", "few_shot")
        change_recipe(recipe.model_dump(), [*changes.items(), selected], "procedure few_shot")

        # The network with a head has no branches.
        head = entry(head_name(recipe.model.name)).config
        options = [key for key in changes if key.startswith("model.config.")]
        unused += [key for key in options if key.split(".")[2] not in head.model_fields]

    if is_few_shot or len(opened.held_out):  # the run itself holds out no images
        unused += sorted({"data.hold_out", "data.hold_out_seed"} & changes.keys())
    if unused:
        raise ConfigError(f"{', '.join(unused)}: not used in this run; remove them")


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
    num_opened = len(opened.train)
    opened = leave_out_deciding(selected, opened)
    if num_deciding := num_opened - len(opened.train):
        callback.on_warning(
            f"{amount(num_deciding, 'photo')} of a server's sample left out, because they decide in `compare`"
        )
    division = divide_images(selected, opened, last, strategy, given.group_copies)
    check_data(selected, opened, division, given.changes, callback)
    if isinstance(selected, LoopRecipe) and isinstance(selected.procedure, LoopConfig):
        division = leave_out_seen(division, len(opened.held_out), strategy, callback)
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
            f"the extra {extra} also where the network is served"
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
