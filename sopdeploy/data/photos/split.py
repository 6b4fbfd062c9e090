"""Held-out images of a source that has none: chosen once, recorded by the run, and then read from the record.

Which images are near-duplicates depends on rounding, and so on the processor. A run that is
resumed elsewhere therefore does not choose again. A run that hashes no files searches no
near-duplicates, and makes the same choice again.

Letters: N images, M held-out images.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.photos.copies import Groups
from sopdeploy.data.photos.photo import LabeledImages, Split

NONE = -1  # the group of a training image in a choice
# (N,): the group of each held-out image, and `NONE` for each training image
Choice = NDArray[np.int64]
Record = NDArray[np.int64]  # (M, 2): hash of the file and group of each held-out image, sorted


def hold_out(
    keys: Sequence[str],
    targets: NDArray[np.int64] | NDArray[np.float32] | NDArray[np.bool_],
    fraction: float,
    seed: int,
) -> NDArray[np.bool_]:
    """Select about *fraction* of every class for the held-out set, as a mask (N,).

    Of a class of two images or more, this is at least one image, and never all. If images have
    several classes, it may be none, because an image is held out only if each of its classes
    keeps another one for training. The selection depends on *seed*, *fraction*, and the *keys*
    and classes of the images, not on their order. It is the same on every machine and in every
    version, so that an image used for training is never used for evaluation later. *targets*
    are class indices (N,), or (N, C) with 1 for every class of an image. With (N, C), the
    classes are processed from the rarest to the most frequent one, then the images without a
    class, as in the iterative stratification of Sechidis et al. (ECML 2011), section 4.
    """
    # The indices of the images in the order of the selection: by hashes, equal ones by key.
    ranks = [(derive_seed(seed, "hold-out", key), key) for key in keys]
    shuffled_N = np.asarray(sorted(range(len(keys)), key=ranks.__getitem__), dtype=np.int64)

    # The classes of each image, the images of each class in this order, and their number.
    classes_of_N: NDArray[np.int64] | list[NDArray[np.int64]]
    if targets.ndim == 1:
        classes_of_N = targets[:, None].astype(np.int64)
        in_training_C = np.bincount(targets)
        sorted_by_class = shuffled_N[np.argsort(targets[shuffled_N], kind="stable")]
        # Divide them where the class changes.
        starts = np.flatnonzero(np.diff(targets[sorted_by_class])) + 1
        class_members = np.split(sorted_by_class, starts)
    else:
        classes_of_N = [np.flatnonzero(row) for row in targets]
        in_training_C = np.count_nonzero(targets, axis=0)
        rarest_first = np.argsort(in_training_C, kind="stable")
        class_members = [shuffled_N[targets[shuffled_N, column] > 0] for column in rarest_first]
        # The images without a class are last.
        class_members.append(shuffled_N[~targets[shuffled_N].any(axis=1)])

    # An image of several classes is decided once, with the rarest of them, and counts for all
    # of them.
    held_out = np.zeros(len(keys), np.bool_)
    decided = np.zeros(len(keys), np.bool_)
    for members in class_members:
        # One image remains for training. A class may have no images here.
        at_most = max(0, len(members) - 1)
        quota = min(max(1, round(fraction * len(members))), at_most)
        missing = quota - int(held_out[members].sum())  # some may be held out already

        for image in members[~decided[members]]:
            if missing <= 0:
                break
            if (in_training_C[classes_of_N[image]] > 1).all():
                held_out[image] = True  # the others are training images
                in_training_C[classes_of_N[image]] -= 1
                missing -= 1
        decided[members] = True
    return held_out


def choose_held_out(
    images: LabeledImages, groups: Groups, fraction: float, seed: int
) -> Choice:
    """Hold out about *fraction* of the groups of every class, at least one, never all.

    A class that is one group has no held-out image. If groups have several classes, a larger one
    may have none either (`hold_out`). A group of *groups* (N,) is held out as a whole or not at
    all, and counts for all classes of its images. *seed* and the identity of the first image of
    each group determine which groups are held out.

    Returns (N,): for held-out images the number of their group, from 0, and `NONE` for training
    images.
    """
    # Of G groups, the first image stands for the others.
    _, first_G, group_N = np.unique(groups, return_index=True, return_inverse=True)
    keys_G = [images.identity(index) for index in first_G.tolist()]
    targets_G = images.targets[first_G]
    if (targets_G[group_N] != images.targets).any():  # images of a group have different classes
        targets_G = np.zeros((len(first_G), len(images.labels)), np.bool_)
        if images.is_multi_label:
            image_indices, class_indices = np.nonzero(images.targets)
            targets_G[group_N[image_indices], class_indices] = True
        else:
            targets_G[group_N, images.targets] = True
    is_held_out_G = hold_out(keys_G, targets_G, fraction, seed)
    return np.where(is_held_out_G[group_N], group_N, NONE)


def record_choice(choice: Choice, hashes: NDArray[np.int64]) -> Record:
    """Record the held-out images of *choice* by the *hashes* (N,) of their files; empty if they are unknown."""
    if not len(hashes):
        return np.zeros((0, 2), np.int64)
    return np.unique(np.stack([hashes, choice], axis=1)[choice != NONE], axis=0)


def recorded_choice(record: Record, hashes: NDArray[np.int64]) -> Choice:
    """Return the choice of *record* for files with *hashes* (N,), in any order; others are for training."""
    if not len(record):  # the run holds out no image: every class is one group
        return np.full(len(hashes), NONE)
    hashes_M, groups_M = record.T  # sorted by the hash, as `np.searchsorted` needs
    position_N = np.searchsorted(hashes_M, hashes).clip(max=len(record) - 1)
    return np.where(hashes_M[position_N] == hashes, groups_M[position_N], NONE)


def divide(split: Split, choice: Choice) -> Split:
    """Hold out the training images of *split* that *choice* names, with their groups."""
    is_held_out = choice != NONE
    held_out = split.train.select(is_held_out).replaced(groups=choice[is_held_out])
    return replace(split, train=split.train.select(~is_held_out), held_out=held_out)
