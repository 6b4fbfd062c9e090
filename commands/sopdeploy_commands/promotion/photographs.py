"""Which photographs of a folder decide about a bundle: recent ones that no bundle was trained on, one of each group.

Photographs that a bundle was trained on are left out: `Origin.sample` has their hashes.
Near-duplicates are not independent; only the first of a group counts. Letters: N photographs, C
classes.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import DataError
from sopdeploy.photos.change import read_change
from sopdeploy.photos.copies import MAX_COMPARED, group_photographs
from sopdeploy.photos.evaluation_images import open_evaluation_images, open_unknown
from sopdeploy.photos.files import LABELLED_NAME
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.project import AS_IT_IS, MAX_RECORDED
from sopdeploy_service.inference.loader import LoadedModel

RECENT_DAYS = 14  # before the newest photograph that a server kept
MIN_RECENT = 100  # photographs that decide, if there are as many


class Photographs(NamedTuple):
    """The photographs of a comparison: `images` with N targets, and masks (N,) of them.

    The `recent` ones decide. Of these, `old` show a class of the first bundle, `new` another class,
    and `common` a class of both bundles. `times` (N,) are seconds as of
    `time.time`, 0 for a photograph that no server kept. `changed_at` is when the traffic changed,
    if that is known.
    """

    images: ImageFiles
    recent: NDArray[np.bool_]
    old: NDArray[np.bool_]
    new: NDArray[np.bool_]
    common: NDArray[np.bool_]
    times: NDArray[np.float64]
    changed_at: datetime | None


class LeftOut(TypedDict):
    """The fields of `BundleComparison` about photographs that are not compared."""

    num_copies: int
    trained_on: int


def select_photographs(
    data: Path, pair: Sequence[LoadedModel], notes: list[str]
) -> tuple[Photographs, LeftOut]:
    """Open the photographs in *data* that no bundle of *pair* was trained on; also return what was left out.

    *notes* receives lines about the folder. Raises `DataError` if no recent photograph of a
    class of both remains.
    """
    # A target is an index in the sorted classes of the pair, which one bundle or both have.
    first_labels, second_labels = (set(model.bundle.labels) for model in pair)
    labels = tuple(sorted(first_labels | second_labels))
    origin = pair[1].bundle.manifest.origin  # the newer one
    all_images = open_evaluation_images(
        data,
        labels,
        other_classes=True,
        reading=AS_IT_IS if origin is None else origin.reading,
        log=notes.append,
    )
    images, left_out = _leave_out_seen(all_images, pair, notes)

    times_N = read_times(images)
    changed_at = read_change(images.root)
    recent_N = are_recent(times_N, changed_at)
    targets_N = images.targets.astype(np.int64)
    is_old_C = np.array([label in first_labels for label in images.labels])
    is_common_C = np.array([label in first_labels & second_labels for label in images.labels])
    common_N = recent_N & is_common_C[targets_N]
    if not common_N.any():
        raise DataError(f"{data}: no photo of a class of both bundles remains; add some")

    is_old_N = is_old_C[targets_N]
    photographs = Photographs(
        images,
        recent_N,
        old=recent_N & is_old_N,
        new=recent_N & ~is_old_N,
        common=common_N,
        times=times_N,
        changed_at=changed_at,
    )
    return photographs, left_out


def open_different_unknown(folder: Path, notes: list[str]) -> tuple[ImageFiles | None, int]:
    """Open the unknown images in *folder*, one of each group of near-duplicates; count the others.

    Returns None and 0 if the folder has no image that counts.
    """
    images, note = open_unknown(folder)
    if note:
        notes.append(note)
    if images is None:
        return None, 0
    is_first_N = _are_first(group_photographs(images).groups)
    return images.select(is_first_N), int((~is_first_N).sum())


def read_times(images: ImageFiles) -> NDArray[np.float64]:
    """Read when *images* were kept (N,), 0 for those that no server kept, whose time is not known.

    The time of a kept photograph is the time of its file, which does not change when it is labelled.
    """
    paths = [images.path(index) for index in range(len(images))]
    return np.array(
        [path.stat().st_mtime if LABELLED_NAME.fullmatch(path.name) else 0.0 for path in paths]
    )


def are_recent(
    times_N: NDArray[np.float64], changed_at: datetime | None = None
) -> NDArray[np.bool_]:
    """Return the mask (N,) of recent photographs, which have *times_N*.

    These are the photographs that a server kept since the traffic has changed or, if that is not
    known, in the `RECENT_DAYS` before its newest one, but at least the `MIN_RECENT` newest, and all
    that no server kept.
    """
    is_kept_N = times_N > 0
    kept_times = np.sort(times_N[is_kept_N])[::-1]  # the newest first
    if len(kept_times) <= MIN_RECENT:
        return np.ones(len(times_N), np.bool_)

    begin = kept_times[0] - 86_400 * RECENT_DAYS
    if changed_at is not None:
        begin = changed_at.timestamp()
    return ~is_kept_N | (times_N >= min(begin, kept_times[MIN_RECENT - 1]))


def _leave_out_seen(
    images: ImageFiles, models: Sequence[LoadedModel], notes: list[str]
) -> tuple[ImageFiles, LeftOut]:
    """Leave out training images of *models* with their near-duplicates, and copies among the others.

    Also returns what was left out. *notes* receives lines about what could not be left out.
    Raises `DataError` if no image remains.
    """
    grouped = group_photographs(images)

    # The images whose hashes a bundle has recorded. A record has at most `MAX_RECORDED` hashes; a full
    # one may lack training images.
    recorded_N = np.zeros(len(images), np.bool_)
    for model in models:
        name = model.bundle.name
        origin = model.bundle.manifest.origin
        if origin is None or not origin.sample:
            notes.append(
                f"{name}: its training images are not recorded; leave them out yourself"
            )
            continue

        in_record_N = np.isin(grouped.file_hashes, origin.sample)
        recorded_N |= in_record_N
        if in_record_N.any() and len(origin.sample) == MAX_RECORDED:
            notes.append(
                f"{name}: may have been trained on more of these photos than its record tells"
            )

    # Near-duplicates share a group. The whole group of a recorded image is left out; of another
    # one, the first photograph counts.
    if len(images) > MAX_COMPARED:
        notes.append(
            f"{images.root}: over {MAX_COMPARED:,} images; only equal files are left out"
        )
    group_N = grouped.groups
    trained_on_N = np.isin(group_N, group_N[recorded_N])
    is_first_N = _are_first(group_N)
    counts_N = is_first_N & ~trained_on_N
    if not counts_N.any():
        raise DataError(
            f"{images.root}: a bundle was trained on all of these photos; give others"
        )

    left_out: LeftOut = {
        "num_copies": int((~is_first_N & ~trained_on_N).sum()),
        "trained_on": int(trained_on_N.sum()),
    }
    return images.select(counts_N), left_out


def _are_first(group_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the mask (N,) of the images that are the first of their group."""
    # The index of the first image of each of G groups
    _, first_G = np.unique(group_N, return_index=True)
    return np.isin(np.arange(len(group_N)), first_G)
