"""Which pictures cannot be read: all of them at once, so that a folder is repaired in one go.

Leaving them out (`skip_corrupt`) happens before the first step, so that the order of every epoch stays a
function of (seed, epoch) and the same after a resume and for any number of processes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from sopdeploy.data.base import LabeledImages, Split
from sopdeploy.data.image_files import ImageFiles, Opening, loaded
from sopdeploy.data.tar.store import cache_folder
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write

CHUNK = 64  # pictures that a thread takes at a time
MOST_NAMED = 200  # in one message; `sopdeploy data check` names all of any number
Finding = TypeVar("Finding")


def each(work: Callable[[int], Finding], count: int) -> Iterator[Finding]:
    """Yield *work* of 0 to *count* - 1 in order, on a thread per core: decoding holds no lock."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(lambda chunk: [work(index) for index in chunk], chunks):
            yield from found


def find_unreadable(pictures: ImageFiles) -> dict[int, str]:
    """Return what is wrong with each picture that cannot be read, by its position.

    JPEGs are decoded at an eighth of their size: every byte is read all the same.
    """

    def problem(index: int) -> str:
        try:
            picture = pictures.header(index)
            picture.draft(None, (1, 1))
            loaded(picture, pictures.where(index))
        except DataError as found:
            return str(found)
        return ""

    return {index: found for index, found in enumerate(each(problem, len(pictures))) if found}


def unreadable_images_error(first: DataError, *parts: LabeledImages) -> DataError:
    """Return the error that names every picture of *parts* that cannot be read; *first* where none is."""
    problems = [
        problem
        for part in parts
        if isinstance(part, ImageFiles)
        for problem in find_unreadable(part).values()
    ]
    if len(problems) < 2:
        return first
    more = len(problems) - MOST_NAMED
    rest = f"; and {more} more, which `sopdeploy data check` names" if more > 0 else ""
    return DataError(
        f"{len(problems)} pictures cannot be used (data.skip_corrupt=true leaves them out): "
        + "; ".join(problems[:MOST_NAMED])
        + rest
    )


def without_unreadable(split: Split, opening: Opening) -> Split:
    """Return *split* without the pictures that cannot be read, their files named in `skipped`.

    Raises `DataError` for a class of which nothing is left.
    """
    train, train_names = readable_part(split.train, opening)
    held_out, held_out_names = readable_part(split.held_out, opening)
    skipped = train_names + held_out_names
    if skipped:
        opening.say(f"{len(skipped)} pictures cannot be read and are left out: {', '.join(skipped)}")
    return replace(split, train=train, held_out=held_out, skipped=skipped)


def readable_part(pictures: LabeledImages, opening: Opening) -> tuple[LabeledImages, tuple[str, ...]]:
    """Return the readable ones of *pictures* and the names of the others."""
    if not isinstance(pictures, ImageFiles):
        return pictures, ()
    bad = kept_finding(pictures, opening.cache)
    good = np.ones(len(pictures), dtype=np.bool_)
    good[bad] = False
    left = pictures.only(good)
    gone = sorted(set(pictures.targets.tolist()) - set(left.targets.tolist()))
    if gone:
        names = ", ".join(pictures.labels[target] for target in gone)
        raise DataError(f"{pictures.store.root}: no image of the classes {names} can be read; repair them")
    return left, tuple(pictures.where(index) for index in bad)


def kept_finding(pictures: ImageFiles, cache: Path | None) -> list[int]:
    """Return the positions of unreadable pictures; kept in the cache folder where one is given."""
    if cache is None:
        return list(find_unreadable(pictures))
    path = cache_folder(cache) / f"unreadable.{state_of(pictures)}.json"
    try:
        kept = json.loads(path.read_bytes())
        return sorted({int(index) for index in kept if 0 <= int(index) < len(pictures)})
    except (OSError, ValueError, TypeError):
        found = list(find_unreadable(pictures))
        with atomic_write(path, shared=True) as partial:
            partial.write_text(json.dumps(found))
        return found


def state_of(pictures: ImageFiles) -> str:
    """Return what changes with the files' names or sizes."""
    digest = hashlib.sha256(os.fsencode(pictures.store.root))
    for name in pictures.paths.tolist():
        try:
            size = pictures.store.size(name)
        except OSError:
            size = -1
        digest.update(b"%s %d\n" % (name, size))
    return digest.hexdigest()[:16]
