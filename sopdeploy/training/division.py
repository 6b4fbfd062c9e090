"""The images of a run, divided into those that train and those that are held out."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.base.project import MAX_RECORDED
from sopdeploy.data.photos.clips import clips_of_images
from sopdeploy.data.photos.copies import NO_PAIRS, Grouped, Groups, connect, group_photographs
from sopdeploy.data.photos.file_checks import describe_contradictions, find_seen, hash_images
from sopdeploy.data.photos.kept import decides, is_sampled
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
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.evaluation.metrics import NO_IMAGES
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.procedure import select_procedure
from sopdeploy.training.records.checkpoints import read_held_out, read_left_out
from sopdeploy.training.settings.head import FewShotConfig, FineTuneConfig
from sopdeploy.training.settings.recipe import LoopConfig, Recipe
from sopdeploy.weights.checkpoint import Checkpoint

ONE_GROUP = (
    "all images are one group (they look alike, or are in one folder), or share "
    "groups with other classes, so the accuracy of the class cannot be measured; "
    "add different photos"
)
MAX_HASHED = 50_000  # images of a part; reading more delays the start by more than a minute
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


def recorded_sample(images: LabeledImages) -> list[int]:
    """List the positions of a server's random sample among *images*; empty if a bundle cannot record so many."""
    sampled = [
        index
        for index in range(len(images))
        if is_sampled(PurePath(images.identity(index)).name)
    ]
    return sampled if len(sampled) <= MAX_RECORDED else []


def leave_out_deciding(recipe: Recipe, opened: Split) -> Split:
    """Leave half of a server's random sample out of the training images *opened*, to decide in `compare`.

    The few-shot procedure answers each photo out of fold and records this in the bundle, so that it
    leaves none out, unless they are too many for the record (`recorded_sample`). Nor is a photo of a class left out
    that would have fewer than two.
    """
    images = opened.train
    names = [PurePath(images.identity(index)).name for index in range(len(images))]
    decides_N = np.asarray([decides(name) for name in names], np.bool_)
    if not decides_N.any() or (
        isinstance(recipe.procedure, FewShotConfig) and recorded_sample(images)
    ):
        return opened

    if not images.is_multi_label:
        is_small_K = images.select(~decides_N).class_counts() < 2
        decides_N &= ~is_small_K[images.targets.astype(np.int64)]
    return replace(opened, train=images.select(~decides_N))


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
    opened = leave_out_deciding(selected, opened)
    return divide_images(selected, opened, last, Strategy(torch.device("cpu")))


def check_data(
    recipe: Recipe, opened: Split, division: Division, keys: Collection[str], callback: Callback
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


def leave_out_seen(
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
