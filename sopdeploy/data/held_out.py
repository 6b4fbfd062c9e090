"""Held-out images of a source that has none: chosen once, recorded by the run, and then read from the record.

Which images are near-duplicates depends on rounding, and so on the processor. A run that is resumed elsewhere
therefore does not choose again.

Letters: N images, M held-out images.
"""

from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages, Split, hold_out
from sopdeploy.data.near import MAX_SIGNATURES, Groups, connect, group_by_appearance
from sopdeploy.errors import DataError

NONE = -1  # the group of a training image in a choice
Choice = NDArray[np.int64]  # (N,): the group of each held-out image, and `NONE` for each training image
Record = NDArray[np.int64]  # (M, 2): hash of the file and group of each held-out image, sorted


def choose_held_out(images: LabeledImages, hashes: NDArray[np.int64], fraction: float, seed: int) -> Choice:
    """Choose *fraction* of the images of every class; a class that is one group has no held-out image.

    *seed* and the identities of the images determine which. Images of one group are on one side, as are
    files with equal *hashes* (N,), those of `hash_images`, or (0,) if unknown, and near-duplicates, unless
    there are too many images or one cannot be read.
    """
    groups = _find_groups(images, hashes)
    # Of G groups, the first image stands for the others.
    _, first_G, group_N = np.unique(groups, return_index=True, return_inverse=True)
    keys_G = [images.identity(index) for index in first_G.tolist()]
    is_held_out_G = hold_out(keys_G, images.targets[first_G], fraction, seed)
    return np.where(is_held_out_G[group_N], group_N, NONE)


def _find_groups(images: LabeledImages, hashes: NDArray[np.int64]) -> Groups:
    """Group *images* by what shows that they belong together; files that cannot be read have the hash 0."""
    known = connect(len(images), np.zeros((2, 0), np.intp), images.groups)
    if len(images) <= MAX_SIGNATURES:
        with suppress(DataError):  # an unreadable image: the run finds and names all of them later
            return group_by_appearance(images)
    if len(hashes):
        return connect(len(images), np.zeros((2, 0), np.intp), known, np.where(hashes == 0, known, hashes))
    return known


def record_choice(choice: Choice, hashes: NDArray[np.int64]) -> Record:
    """Record *choice* by the *hashes* (N,) of the files; empty if they are unknown."""
    if not len(hashes):
        return np.zeros((0, 2), np.int64)
    return np.unique(np.stack([hashes, choice], axis=1)[choice != NONE], axis=0)


def recorded_choice(record: Record, hashes: NDArray[np.int64]) -> Choice:
    """Return the choice of *record* for files with *hashes* (N,), in any order; others are for training."""
    if not len(record):  # the run holds out no image: every class is one group
        return np.full(len(hashes), NONE)
    recorded_M, groups_M = record.T
    position_N = np.searchsorted(recorded_M, hashes).clip(max=len(record) - 1)
    return np.where(recorded_M[position_N] == hashes, groups_M[position_N], NONE)


def divide(split: Split, choice: Choice) -> Split:
    """Hold out the training images of *split* that *choice* names, with their groups."""
    is_held_out = choice != NONE
    held_out = split.train.select(is_held_out).replaced(groups=choice[is_held_out])
    return replace(split, train=split.train.select(~is_held_out), held_out=held_out)
