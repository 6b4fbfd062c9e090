"""The data sources that a recipe can name, and the function that opens them.

Unreadable images are left out (`skip_corrupt`) before the first step, so that the order of every epoch
depends on (seed, epoch) only, also after a resume and for any number of processes.
"""

from dataclasses import replace
from typing import Annotated

import numpy as np
import pydantic

from sopdeploy.config import with_registered
from sopdeploy.data.base import DataSource, LabeledImages, Split, select_subset
from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.datasets.libraries import (
    CifarConfig,
    DigitsConfig,
    OfficialConfig,
    detect_kind,
    open_cifar,
    open_digits,
    open_official,
)
from sopdeploy.data.folders import Log, ignore
from sopdeploy.data.image_files import find_unreadable
from sopdeploy.errors import DataError, shorten
from sopdeploy.files import expand_user
from sopdeploy.plugins import DATA_SOURCES

DataConfig = Annotated[
    DigitsConfig | FolderConfig | CifarConfig | OfficialConfig,
    pydantic.Field(discriminator="kind"),
    with_registered(DATA_SOURCES, DataSource),
    pydantic.SerializeAsAny(),
]


def register_data_source(config: type[DataSource]) -> None:
    """Let recipes name the data source *config*, as `data.kind` with the value of its field `kind`.

    Raises `ConfigError` if *config* is no subclass of `DataSource`, or its name is invalid or in use.
    """
    DATA_SOURCES.register_config(config, DataSource)


def open_data(config: DataConfig | DataSource, log: Log = ignore) -> Split:
    """Open the training and held-out images of *config*, restricted to its subset of classes if it has one.

    Slow steps and skipped files are reported to *log*. Raises `ConfigError` if no path is set and `DataError`
    if the data cannot be used.
    """
    match config:
        case DigitsConfig():
            split = open_digits()
        case CifarConfig():
            split = open_cifar(config)
        case DataSource():
            split = config.open(log)
        case OfficialConfig():
            split = open_official(config.kind, config.path)
        case FolderConfig():
            kind = None if config.path is None else detect_kind(expand_user(config.path))
            split = open_folder(config, log) if kind is None else open_official(kind, config.path)
    if config.classes is not None:
        split = select_subset(split, config.classes)
    skip_corrupt = isinstance(config, FolderConfig | OfficialConfig) and config.skip_corrupt
    return _drop_unreadable(split, log) if skip_corrupt else split


def _drop_unreadable(split: Split, log: Log) -> Split:
    """Remove unreadable images from *split* and list their files in `skipped`.

    Raises `DataError` if a class has no readable image.
    """
    readable_sets: list[LabeledImages] = []  # train, held out
    skipped: list[str] = []
    for images in (split.train, split.held_out):
        unreadable = list(find_unreadable(images))
        mask = np.ones(len(images), dtype=np.bool_)
        mask[unreadable] = False
        readable = images.select(mask)
        empty = np.flatnonzero((images.class_counts() > 0) & (readable.class_counts() == 0))
        if empty.size:
            names = [images.labels[target] for target in empty]
            raise DataError(
                f"data: no readable image in the classes {shorten(names)}; repair the files",
                lists={"classes": names},
            )
        readable_sets.append(readable)
        skipped += [images.describe(index) for index in unreadable]
    if skipped:
        log(f"{len(skipped)} unreadable images are left out: {shorten(skipped)}")
    return replace(split, train=readable_sets[0], held_out=readable_sets[1], skipped=tuple(skipped))
