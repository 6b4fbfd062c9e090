"""Detection of unreadable images.

Unreadable images are left out (`skip_corrupt`) before the first step, so that the order of every epoch
depends on (seed, epoch) only, also after a resume and for any number of processes.
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
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.data.image_files import ImageFiles, load_pixels
from sopdeploy.data.tar.store import cache_folder
from sopdeploy.errors import DataError
from sopdeploy.files import atomic_write

CHUNK = 64  # images per task; decoding releases the GIL
MAX_LISTED = 200  # files named in an error message; `sopdeploy data check` names all
Result = TypeVar("Result")


def map_threaded(function: Callable[[int], Result], count: int) -> Iterator[Result]:
    """Yield *function*(0) to *function*(count - 1) in order, computed by one thread per core."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for results in pool.map(lambda chunk: [function(index) for index in chunk], chunks):
            yield from results


def find_unreadable(images: ImageFiles) -> dict[int, str]:
    """Find the images that cannot be decoded; returns error messages by index.

    JPEGs are decoded at an eighth of their size, which still reads every byte.
    """

    def check(index: int) -> str:
        try:
            image = images.open(index)
            image.draft(None, (1, 1))
            load_pixels(image, images.path(index))
        except DataError as error:
            return str(error)
        return ""

    return {index: error for index, error in enumerate(map_threaded(check, len(images))) if error}


def unreadable_images_error(first: DataError, *parts: LabeledImages) -> DataError:
    """Build an error that names every unreadable image of *parts*; *first* if there is at most one."""
    errors = [
        error for part in parts if isinstance(part, ImageFiles) for error in find_unreadable(part).values()
    ]
    if len(errors) < 2:
        return first
    more = len(errors) - MAX_LISTED
    rest = f"; and {more} more, listed by `sopdeploy data check`" if more > 0 else ""
    return DataError(
        f"{len(errors)} images cannot be used (set data.skip_corrupt=true to leave them out): "
        + "; ".join(errors[:MAX_LISTED])
        + rest
    )


def drop_unreadable(split: Split, options: OpenOptions) -> Split:
    """Remove unreadable images from *split* and list their files in `skipped`.

    Raises `DataError` if a class has no readable image.
    """
    parts: list[LabeledImages] = []
    skipped: list[str] = []
    for images in (split.train, split.held_out):
        if not isinstance(images, ImageFiles):
            parts.append(images)
            continue
        unreadable = cached_unreadable(images, options.cache)
        mask = np.ones(len(images), dtype=np.bool_)
        mask[unreadable] = False
        readable = images.select(mask)
        empty = sorted(set(images.targets.tolist()) - set(readable.targets.tolist()))
        if empty:
            names = ", ".join(images.labels[target] for target in empty)
            raise DataError(
                f"{images.store.root}: no readable image in the classes {names}; repair the files"
            )
        parts.append(readable)
        skipped += [str(images.path(index)) for index in unreadable]
    if skipped:
        options.log(f"{len(skipped)} unreadable images are left out: {', '.join(skipped)}")
    return replace(split, train=parts[0], held_out=parts[1], skipped=tuple(skipped))


def cached_unreadable(images: ImageFiles, cache: Path | None) -> list[int]:
    """Find the indices of unreadable images; the result is stored in the *cache* folder, if any.

    The name of the cache file depends on the names and sizes of all files.
    """
    if cache is None:
        return list(find_unreadable(images))
    digest = hashlib.sha256(os.fsencode(images.store.root))
    for name in images.paths.tolist():
        try:
            size = images.store.size(name)
        except OSError:
            size = -1
        digest.update(b"%s %d\n" % (name, size))
    path = cache_folder(cache) / f"unreadable.{digest.hexdigest()[:16]}.json"
    try:
        stored = json.loads(path.read_bytes())
        return sorted({int(index) for index in stored if 0 <= int(index) < len(images)})
    except (OSError, ValueError, TypeError):
        found = list(find_unreadable(images))
        with atomic_write(path, shared=True) as partial:
            partial.write_text(json.dumps(found))
        return found
