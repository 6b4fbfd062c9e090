"""The data sources that a recipe can name, and the function that opens them.

Unreadable images are left out (`skip_corrupt`) before the first step, so that the order of every epoch
depends on (seed, epoch) only, also after a resume and for any number of processes.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic

from sopdeploy.data.base import LabeledImages, Split
from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.datasets.official import OfficialConfig, detect_kind, open_official
from sopdeploy.data.datasets.small import CifarConfig, DigitsConfig, open_cifar, open_digits
from sopdeploy.data.folder_store import Log, OpenOptions, ignore
from sopdeploy.data.image_files import ImageFiles, find_unreadable
from sopdeploy.data.subset import select_subset
from sopdeploy.data.tar import cache_folder
from sopdeploy.errors import DataError, shorten
from sopdeploy.files import atomic_write, expand_user

DataConfig = Annotated[
    DigitsConfig | FolderConfig | CifarConfig | OfficialConfig, pydantic.Field(discriminator="kind")
]


def open_data(config: DataConfig, log: Log = ignore) -> Split:
    """Open the training and held-out images of *config*, restricted to its subset of classes if it has one.

    Slow steps and skipped files are reported to *log*. Raises `ConfigError` if no path is set and `DataError`
    if the data cannot be used.
    """
    match config:
        case DigitsConfig():
            return select_subset(open_digits(), config.classes)
        case CifarConfig():
            return select_subset(open_cifar(config), config.classes)
    options = OpenOptions(config.cache, log)
    if isinstance(config, OfficialConfig):
        split = open_official(config.kind, config.path, options)
    elif config.path is not None and (kind := detect_kind(expand_user(config.path))):
        split = open_official(kind, config.path, options)
    else:
        split = open_folder(config, options)
    split = select_subset(split, config.classes)
    return _drop_unreadable(split, options) if config.skip_corrupt else split


def _drop_unreadable(split: Split, options: OpenOptions) -> Split:
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
        empty = np.flatnonzero((images.class_counts() > 0) & (readable.class_counts() == 0))
        if empty.size:
            names = [images.labels[target] for target in empty]
            raise DataError(
                f"{images.store.root}: no readable image in the classes {shorten(names)}; repair the files",
                lists={"classes": names},
            )
        parts.append(readable)
        skipped += [str(images.path(index)) for index in unreadable]
    if skipped:
        options.log(f"{len(skipped)} unreadable images are left out: {shorten(skipped)}")
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
    if path.is_file():
        stored: list[int] = json.loads(path.read_bytes())
        return stored
    unreadable = list(find_unreadable(images))
    with atomic_write(path, shared=True) as partial:
        partial.write_text(json.dumps(unreadable))
    return unreadable
