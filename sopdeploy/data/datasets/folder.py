"""Images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/.

DIR may be a tar archive instead, or a folder of archives; so may train/ and val/.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.data.base import Split, hold_out
from sopdeploy.data.image_files import (
    ENDINGS,
    FolderStore,
    ImageFiles,
    Opening,
    Store,
    describe_ignored_files,
    passed_over,
    visible_folders,
)
from sopdeploy.data.tar.store import is_archive, open_tars
from sopdeploy.errors import ConfigError, DataError

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "test")  # the first that exists is measured on


class FolderConfig(StrictModel):
    """Where the images lie, and which of them are held out where there is no folder of such.

    `hold_out` is the fraction of every class, drawn by `hold_out_seed`: it belongs to the data, not to
    the run, so that runs with other seeds are measured on the same images. `cache` is where indexes of
    archives are kept and compressed ones unpacked. `skip_corrupt` leaves out images that cannot be read.
    """

    kind: Literal["folder"]
    path: Path | None = None
    cache: Path | None = None
    hold_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    hold_out_seed: int = 0
    skip_corrupt: bool = False


def open_folder(config: FolderConfig, opening: Opening | None = None) -> Split:
    """Return the images of a folder; raises `DataError` naming what cannot be used.

    Classes are sorted by name. Hidden folders and files of other kinds are ignored.
    """
    if config.path is None:
        raise ConfigError(
            "data.path: not set; give --data DIR, the folder that holds one subfolder per class"
        )
    opening = opening or Opening(config.cache)
    store = open_store(config.path.expanduser(), opening)
    split = split_of(store, config)
    others = passed_over(store, store.folders())
    if others:
        opening.say(f"{store.root}: ignored files without an image suffix: {describe_ignored_files(others)}")
    return split


def split_of(store: Store, config: FolderConfig) -> Split:
    """Return the images to learn from and to measure on: of train/ and val/, or of every class a fraction."""
    names = store.folders()
    held_names = [name for name in HELD_OUT if name in names]
    if TRAIN not in names:
        if names and not set(names) - set(HELD_OUT):
            raise DataError(
                f"{store.root}: holds {names[0]} but no {TRAIN}; put the images to learn from there"
            )
        return split_folder(store, config)
    train = store.below(TRAIN)
    if not held_names:
        return split_folder(train, config)
    labels = class_names(train)
    return Split(train=scan(train, labels), held_out=pictures_of(store.below(held_names[0]), labels))


def open_store(path: Path, opening: Opening) -> Store:
    """Return what lies at *path*: a tar file, or a folder of files, or of tar files and no folders."""
    if path.is_file() and is_archive(path):
        return open_tars(path, [path], (TRAIN, *HELD_OUT), opening)
    if not path.is_dir():
        what = "neither a folder nor a tar file" if path.exists() else "no such folder"
        raise DataError(
            f"{path}: {what}; give one that holds one subfolder of images per class, or a tar file"
        )
    if not visible_folders(path):
        archives = sorted(file for file in path.iterdir() if file.is_file() and is_archive(file))
        if archives:
            return open_tars(path, archives, (TRAIN, *HELD_OUT), opening)
    return FolderStore(path, lambda inside: open_store(inside, opening))


def open_classes(root: Path, labels: tuple[str, ...]) -> ImageFiles:
    """Return the images below *root* for a network that knows *labels*; folders are matched by name.

    Raises `DataError` naming the classes that only one of both has.
    """
    return pictures_of(open_store(root, Opening()), labels)


def pictures_of(store: Store, labels: tuple[str, ...]) -> ImageFiles:
    """Return the images of *store*, whose folders must be *labels*; raises `DataError` naming the others."""
    found = set(store.folders())
    unknown, missing = sorted(found - set(labels)), sorted(set(labels) - found)
    wrong = []
    if unknown:
        wrong.append(f"classes {', '.join(unknown)} are none of those learnt, remove them or learn them too")
    if missing:
        wrong.append(f"classes {', '.join(missing)} of those learnt are missing, add them")
    if wrong:
        raise DataError(f"{store.root}: {'; '.join(wrong)}")
    return scan(store, labels)


def class_names(store: Store) -> tuple[str, ...]:
    """Return the classes of *store*; raises `DataError` for fewer than two."""
    names = store.folders()
    if len(names) > 1:
        return tuple(names)
    if names:
        raise DataError(f"{store.root}: holds one class only ({names[0]}); a classifier needs at least two")
    raise DataError(f"{store.root}: holds no class folders; sort the images into one subfolder per class")


def scan(store: Store, labels: tuple[str, ...]) -> ImageFiles:
    """Return the images of every class, sorted; raises `DataError` naming the classes without."""
    found = [store.images(label) for label in labels]
    empty = [label for label, paths in zip(labels, found, strict=True) if not paths]
    if empty:
        same = f" (as in {', '.join(empty[1:])})" if len(empty) > 1 else ""
        others = describe_ignored_files(passed_over(store, empty[:1]))
        instead = f", files of other kinds only ({others})" if others else ""
        raise DataError(
            f"{store.root / empty[0]}: no images in this class folder{same}{instead}; "
            f"add some ({', '.join(ENDINGS)}) or remove the folder"
        )
    paths = np.asarray([path for of_class in found for path in of_class], dtype=np.bytes_)
    targets = np.repeat(np.arange(len(labels)), [len(of_class) for of_class in found])
    return ImageFiles(store, labels, paths, targets)


def split_folder(store: Store, config: FolderConfig) -> Split:
    """Return the images of *store* with a fraction of every class held out."""
    labels = class_names(store)
    everything = scan(store, labels)
    counts = np.bincount(everything.targets)
    if counts.min() == 1:
        alone = store.root / labels[int(counts.argmin())]
        raise DataError(f"{alone}: one image only; add another, one has to be held out")
    keys = [path.decode("utf-8", "surrogateescape") for path in everything.paths.tolist()]
    held = np.asarray(hold_out(keys, everything.targets.tolist(), config.hold_out, config.hold_out_seed))
    return Split(train=everything.only(~held), held_out=everything.only(held))
