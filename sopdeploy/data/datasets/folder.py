"""Images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/.

DIR, train/ and val/ may also be tar archives or folders of archives. A folder with `labels.csv` holds images
with any number of classes each (`label_table`).
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic

from sopdeploy.data.base import Split, hold_out
from sopdeploy.data.datasets.label_table import (
    VAL,
    has_label_table,
    read_label_table,
    split_table,
)
from sopdeploy.data.folder_store import LABELS_FILE, SUFFIXES, FolderStore, OpenOptions
from sopdeploy.data.image_files import FileStore, ImageFiles, count_ignored_files, describe_ignored_files
from sopdeploy.data.subset import ClassSubset
from sopdeploy.data.tar import archive_suffix, open_tars
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "test")  # the first existing one is used


class FolderConfig(ClassSubset):
    """Location of the images and selection of the held-out ones.

    Without a folder of held-out images, the fraction `hold_out` of every class is selected by
    `hold_out_seed`. It is not the seed of the run, so all runs are evaluated on the same images. `cache`
    stores archive indexes and decompressed archives. `skip_corrupt` leaves out unreadable images.
    """

    kind: Literal["folder"]
    path: Path | None = None
    cache: Path | None = None
    hold_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    hold_out_seed: int = 0
    skip_corrupt: bool = False


def open_folder(config: FolderConfig, options: OpenOptions | None = None) -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    A folder with `labels.csv` gives targets (N, C) instead of class indices.

    Hidden folders and files without an image suffix are ignored. Raises `DataError` if the images cannot be
    used.
    """
    if config.path is None:
        raise ConfigError("data.path: not set; give --data DIR, the folder with one subfolder per class")
    options = options or OpenOptions(config.cache)
    store = open_store(expand_user(config.path), options)
    if has_label_table(store):
        return split_table(read_label_table(store), config.hold_out, config.hold_out_seed)
    split = _open_split(store, config)
    ignored = count_ignored_files(store, store.folders())
    if ignored:
        options.log(f"{store.root}: ignored files without an image suffix: {describe_ignored_files(ignored)}")
    return split


def open_store(path: Path, options: OpenOptions) -> FileStore:
    """Open a folder, a tar archive, or a folder that holds archives and no subfolders."""
    if path.is_file() and archive_suffix(path):
        return open_tars(path, [path], (TRAIN, *HELD_OUT), options)
    if not path.is_dir():
        problem = "neither a folder nor a tar file" if path.exists() else "no such folder"
        raise DataError(
            f"{path}: {problem}; give a folder or tar file with one subfolder of images per class"
        )
    store = FolderStore(path, lambda folder: open_store(path / folder, options))
    if not store.folders():
        archives = sorted(file for file in path.iterdir() if file.is_file() and archive_suffix(file))
        if archives:
            return open_tars(path, archives, (TRAIN, *HELD_OUT), options)
    return store


def open_classes(root: Path, labels: tuple[str, ...]) -> ImageFiles:
    """Open the images below *root* for a network with the classes *labels*, matched by folder name.

    Raises `DataError` naming unknown and missing classes, or if an image may have several classes.
    """
    store = open_store(root, OpenOptions())
    if has_label_table(store):
        raise DataError(
            f"{root / LABELS_FILE}: lists several classes per image, but the network predicts one; "
            "sort the images into one subfolder per class"
        )
    return match_classes(store, labels)


def open_multi_label(root: Path, labels: tuple[str, ...]) -> ImageFiles:
    """Open the images of `labels.csv` in *root* for a network with the classes *labels*.

    If the table has a split, only its held-out images are opened. Raises `DataError` without a table, or if
    it has other classes.
    """
    store = open_store(root, OpenOptions())
    if not store.label_tables():
        raise DataError(
            f"{root}: has no {LABELS_FILE}, but the network predicts several classes per image; list the "
            "images and their classes in this file"
        )
    table = read_label_table(store, labels)
    return table.part(VAL) if table.is_split else table.images


def match_classes(store: FileStore, labels: tuple[str, ...]) -> ImageFiles:
    """Open the images of *store*, whose folders must be exactly *labels*; raises `DataError`."""
    problems = class_mismatches(store, labels)
    if problems:
        raise DataError(f"{store.root}: {'; '.join(problems)}")
    return scan_classes(store, labels)


def class_mismatches(store: FileStore, labels: tuple[str, ...]) -> list[str]:
    """Describe the folders of *store* that are not in *labels*, and the labels without a folder."""
    found = set(store.folders())
    unknown, missing = sorted(found - set(labels)), sorted(set(labels) - found)
    problems = []
    if unknown:
        problems.append(
            f"classes {', '.join(unknown)} are not training classes, remove them or train on them"
        )
    if missing:
        problems.append(f"training classes {', '.join(missing)} are missing, add them")
    return problems


def class_names(store: FileStore) -> tuple[str, ...]:
    """List the class folders of *store*; raises `DataError` if there are fewer than two."""
    names = store.folders()
    if len(names) > 1:
        return tuple(names)
    if names:
        inner = store.open_folder(names[0]).folders()
        hint = f"; to use the folders in it as classes, give {store.root / names[0]}" if inner[1:] else ""
        raise DataError(
            f"{store.root}: holds only one class ({names[0]}); a classifier needs at least two{hint}"
        )
    raise DataError(f"{store.root}: holds no class folders; sort the images into one subfolder per class")


def scan_classes(store: FileStore, labels: tuple[str, ...]) -> ImageFiles:
    """List the images of every class, sorted; raises `DataError` naming the classes without images."""
    images = list_classes(store, labels)
    problem = describe_empty_classes(images)
    if problem:
        raise DataError(problem)
    return images


def list_classes(store: FileStore, labels: tuple[str, ...]) -> ImageFiles:
    """List the images of every class, sorted; a class may be empty."""
    found = [store.list_files(label)[0] for label in labels]
    paths = np.asarray([path for of_class in found for path in of_class], dtype=np.bytes_)
    targets = np.repeat(np.arange(len(labels)), [len(of_class) for of_class in found])
    return ImageFiles(store, labels, paths, targets)


def describe_empty_classes(images: ImageFiles) -> str:
    """Name the classes without images and what to do; empty if there are none."""
    counts = np.bincount(images.targets, minlength=len(images.labels))
    empty = [images.labels[index] for index in np.flatnonzero(counts == 0)]
    if not empty:
        return ""
    same = f" (also in {', '.join(empty[1:])})" if len(empty) > 1 else ""
    ignored = describe_ignored_files(count_ignored_files(images.store, empty[:1]))
    others = f", only other files ({ignored})" if ignored else ""
    return (
        f"{images.store.root / empty[0]}: no images in this class folder{same}{others}; "
        f"add some ({', '.join(SUFFIXES)}) or remove the folder"
    )


def _open_split(store: FileStore, config: FolderConfig) -> Split:
    names = store.folders()
    held_out = [name for name in HELD_OUT if name in names]
    if TRAIN in names:
        train = store.open_folder(TRAIN)
        if held_out:
            labels = class_names(train)
            held_images = match_classes(store.open_folder(held_out[0]), labels)
            return Split(train=scan_classes(train, labels), held_out=held_images)
        store = train
    elif names and set(names) <= set(HELD_OUT):
        raise DataError(f"{store.root}: holds {names[0]} but no {TRAIN}; put the training images there")
    labels = class_names(store)
    images = scan_classes(store, labels)
    counts = np.bincount(images.targets)
    if counts.min() == 1:
        single = store.root / labels[int(counts.argmin())]
        raise DataError(f"{single}: only one image; add another, one has to be held out")
    keys = [path.decode("utf-8", "surrogateescape") for path in images.paths.tolist()]
    held = np.asarray(hold_out(keys, images.targets.tolist(), config.hold_out, config.hold_out_seed))
    return Split(train=images.select(~held), held_out=images.select(held), divided=True)
