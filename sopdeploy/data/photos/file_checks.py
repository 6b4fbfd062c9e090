"""What the files of a data source tell: hashes, formats, contradictions, and those that are unreadable.

Letters: N images, C classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.environment import usable_cores
from sopdeploy.data.photos.photo import LabeledImages, LeftOut, Split, can_leave_out
from sopdeploy.errors import DataError, amount, shorten, shorten_problems
from sopdeploy.images.signatures import format_of

UNREADABLE = 0  # the hash of a file that cannot be read
CHUNK = 64  # images per task of a thread; decoding releases the GIL
_Result = TypeVar("_Result")


def map_threaded(function: Callable[[int], _Result], count: int) -> Iterator[_Result]:
    """Yield *function*(0) to *function*(count - 1), of images by number, computed by one thread per core."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for results in pool.map(lambda chunk: [function(index) for index in chunk], chunks):
            yield from results


def hash_images(images: LabeledImages) -> NDArray[np.int64]:
    """Return the `file_hash` of each of *images*, (N,); that of an unreadable file is `UNREADABLE`."""

    def hash_image(index: int) -> int:
        try:
            return images.photo(index).file_hash
        except DataError:
            return UNREADABLE

    return np.fromiter(map_threaded(hash_image, len(images)), dtype=np.int64, count=len(images))


def count_formats(images: LabeledImages) -> Counter[str]:
    """Count *images* by the format of their file, a name of `FORMATS`; others are left out."""
    heads = map_threaded(images.read_head, len(images))
    return Counter(filter(None, map(format_of, heads)))


def describe_contradictions(images: LabeledImages, hashes: NDArray[np.int64]) -> str:
    """Name the images with equal *hashes* (N,), those of `hash_images`, and different labels; "" if none.

    Without hashes, nothing is known.
    """
    if not len(hashes):
        return ""

    # For each image, the index of the first one with its hash.
    _, first_of_hash, hash_number_N = np.unique(hashes, return_index=True, return_inverse=True)
    first_N = first_of_hash[hash_number_N].tolist()

    # Images with other labels than this one. Targets are (N,), or (N, C) with several classes.
    is_equal = images.targets[first_N] == images.targets
    same_labels_N = is_equal if is_equal.ndim == 1 else is_equal.all(axis=1)
    is_readable_N = hashes != UNREADABLE
    contradictions = np.flatnonzero(is_readable_N & ~same_labels_N).tolist()
    pairs = [
        f"{images.describe(first_N[index])} = {images.describe(index)}"
        for index in contradictions
    ]
    if not pairs:
        return ""
    return f"the same file has different labels; delete one of each: {shorten(pairs, '; ')}"


def find_seen(
    images: LabeledImages, hashes: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell which *images* (N,) have files with one of the *hashes*, those of training images."""
    if not len(hashes):
        return np.zeros(len(images), np.bool_)
    hashes_N = hash_images(images)
    return np.isin(hashes_N, hashes) & (hashes_N != UNREADABLE)


def describe_seen(
    images: LabeledImages, hashes: Sequence[int] | NDArray[np.int64], *, is_sample: bool = False
) -> str:
    """Say how many of *images* a network was trained on, whose training files have *hashes*; "" if none.

    *is_sample* tells that these are the hashes of some training files only.
    """
    seen = int(find_seen(images, hashes).sum())
    if not seen:
        return ""
    return (
        f"{'at least ' if is_sample else ''}{seen} of {len(images)} images are "
        "training images of this network, so that these figures are too high for "
        "new images"
    )


def find_unreadable(images: LabeledImages) -> dict[int, str]:
    """Return the messages of the errors of the images that cannot be decoded, by index."""

    def error_of(index: int) -> str:
        try:
            images.photo(index).check()
        except DataError as error:
            return str(error)
        return ""

    return {
        index: error for index, error in enumerate(map_threaded(error_of, len(images))) if error
    }


def unreadable_images_error(first: DataError, *parts: LabeledImages) -> DataError:
    """Build an error with every unreadable image of *parts*; return *first* if there are fewer than two."""
    return _name_all(
        first, [error for part in parts for error in find_unreadable(part).values()]
    )


def _name_all(first: DataError, errors: Sequence[str]) -> DataError:
    if len(errors) < 2:
        return first
    return DataError(
        f"{len(errors)} images cannot be used (`sopdeploy train --data FOLDER --dry-run --json` lists all): "
        f"{shorten_problems(errors)}",
        lists={"images": errors},
    )


def leave_out_unreadable(split: Split, first: DataError) -> Split:
    """Leave the damaged and missing images of *split* out.

    The result has one note, which names them; the notes of *split* were told before.

    Raises *first*, the error of the image that was met first, if all images can be read. Raises
    an error that names all unusable images if they are too many (`can_leave_out`),
    or if too few images remain of a class, or no held-out ones.
    """
    unusable = list[LeftOut]()
    errors = list[str]()

    for name, images in (("train", split.train), ("held_out", split.held_out)):
        for index, error in find_unreadable(images).items():
            reason = error.removeprefix(f"{images.describe(index)}: ")
            unusable.append(LeftOut(name, images.identity(index), reason))
            errors.append(error)
    if not unusable:
        raise first

    # What remains must suffice: two images of each class, or one with held-out images.
    count = len(split.train) + len(split.held_out)
    remaining = split.without(unusable)
    least = np.minimum(split.train.class_counts(), 1 if len(split.held_out) else 2)
    too_few = (remaining.train.class_counts() < least).any() or (
        len(split.held_out) and not len(remaining.held_out)
    )
    if too_few or not can_leave_out(len(unusable), count):
        raise _name_all(first, errors)

    return replace(remaining, notes=(describe_left_out(errors),))


def describe_left_out(errors: Sequence[str]) -> str:
    """Name the images that a run leaves out, given as texts `IMAGE: REASON`."""
    return f"{amount(len(errors), 'unusable image')} left out: {shorten_problems(errors)}"
