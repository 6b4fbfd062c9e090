"""Images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/ (`parts`).

DIR, train/ and val/ may also be tar archives or folders of archives. A folder with `labels.csv` holds images
that this table lists with their classes (`label_table`).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic

from sopdeploy.data.base import Split, hold_out
from sopdeploy.data.datasets.label_table import has_label_table, read_label_table, split_table
from sopdeploy.data.folder_store import LABELS_FILE, FolderStore, Log, OpenOptions
from sopdeploy.data.image_files import FileStore, ImageFiles, count_ignored_files, describe_ignored_files
from sopdeploy.data.parts import TRAIN, Parts, find_parts, open_part
from sopdeploy.data.subset import ClassSubset
from sopdeploy.data.tar import archive_suffix, open_tars
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import expand_user
from sopdeploy.images.limits import SUFFIXES


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

    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of class indices.

    Hidden folders and files without an image suffix are ignored; what else is not used is logged. Raises
    `DataError` if the images cannot be used.
    """
    if config.path is None:
        raise ConfigError(
            "data.path: not set; give the folder with one subfolder per class", remedies={"data": None}
        )
    options = options or OpenOptions(config.cache)
    store = open_store(expand_user(config.path), options)
    if has_label_table(store):
        split = split_table(read_label_table(store), config.hold_out, config.hold_out_seed)
        if split.train.targets.ndim == 1:
            options.log(f"{store.root / LABELS_FILE}: every image has one class, so the network predicts one")
        return split
    split = _open_split(store, config, options.log)
    ignored = count_ignored_files(store, store.folders())
    if ignored:
        options.log(f"{store.root}: ignored files without an image suffix: {describe_ignored_files(ignored)}")
    return split


def open_store(path: Path, options: OpenOptions) -> FileStore:
    """Open a folder, a tar archive, or a folder that holds archives and no subfolders."""
    if path.is_file() and archive_suffix(path):
        return open_tars(path, [path], options)
    if not path.is_dir():
        problem = "neither a folder nor a tar file" if path.exists() else "no such folder"
        raise DataError(
            f"{path}: {problem}; give a folder or tar file with one subfolder of images per class"
        )
    store = FolderStore(path, lambda folder: open_store(path / folder, options))
    if not store.folders():
        archives = sorted(file for file in path.iterdir() if file.is_file() and archive_suffix(file))
        if archives:
            return open_tars(path, archives, options)
    return store


def match_classes(store: FileStore, labels: tuple[str, ...]) -> ImageFiles:
    """Open the images of *store*, whose folders must be exactly *labels*; raises `DataError`."""
    problems = class_mismatches(store, labels)
    if problems:
        raise DataError(f"{store.root}: {'; '.join(problems)}")
    return scan_classes(store, labels)


def class_mismatches(store: FileStore, labels: tuple[str, ...]) -> list[str]:
    """Describe the folders of *store* that are not in *labels*, and the labels without a folder."""
    folders = set(store.folders())
    unknown, missing = sorted(folders - set(labels)), sorted(set(labels) - folders)
    problems = []
    if unknown:
        problems.append(f"classes {shorten(unknown)} are not training classes, remove them or train on them")
    if missing:
        problems.append(f"training classes {shorten(missing)} are missing, add them")
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
    by_class = [store.list_files(label)[0] for label in labels]
    paths = np.asarray([path for files in by_class for path in files], dtype=np.bytes_)
    targets = np.repeat(np.arange(len(labels)), [len(files) for files in by_class])
    return ImageFiles(store, labels, paths, targets)


def describe_empty_classes(images: ImageFiles) -> str:
    """Name the classes without images and what to do; empty if there are none."""
    counts = np.bincount(images.targets, minlength=len(images.labels))
    empty = [images.labels[index] for index in np.flatnonzero(counts == 0)]
    if not empty:
        return ""
    same = f" (also in {shorten(empty[1:])})" if len(empty) > 1 else ""
    ignored = describe_ignored_files(count_ignored_files(images.store, empty[:1]))
    others = f", only other files ({ignored})" if ignored else ""
    return (
        f"{images.store.root / empty[0]}: no images in this class folder{same}{others}; "
        f"add some ({', '.join(SUFFIXES)}) or remove the folder"
    )


def _open_split(store: FileStore, config: FolderConfig, log: Log) -> Split:
    parts = find_parts(store)
    for line in describe_parts(store, parts):
        log(line)
    if parts.train:
        train = open_part(store, parts.train)
        if parts.held_out:
            labels = class_names(train)
            held_images = match_classes(open_part(store, parts.held_out[0]), labels)
            return Split(train=_scan(train, labels, log), held_out=held_images)
        store = train
    elif parts.held_out and not parts.others:
        raise DataError(
            f"{store.root}: holds {parts.held_out[0]} but no {TRAIN}; put the training images there"
        )
    labels = class_names(store)
    images = _scan(store, labels, log)
    counts = np.bincount(images.targets)
    if counts.min() == 1:
        single = store.root / labels[int(counts.argmin())]
        raise DataError(f"{single}: only one image; add another, one has to be held out")
    keys = [path.decode("utf-8", "surrogateescape") for path in images.paths.tolist()]
    held = np.asarray(hold_out(keys, images.targets.tolist(), config.hold_out, config.hold_out_seed))
    return Split(train=images.select(~held), held_out=images.select(held), divided=True)


def describe_parts(store: FileStore, parts: Parts) -> Iterator[str]:
    """Say which folders of *store* training does not use, or uses as classes despite their names."""
    unused = (*parts.held_out[1:], *parts.others)
    if parts.train and unused:
        used = " and ".join((parts.train, *parts.held_out[:1]))
        yield f"{store.root}: training uses {used} only, not {shorten(unused)}"
    elif parts.held_out and parts.others:
        yield f"{store.root}: {shorten(parts.held_out)} counts as a class, because there is no folder {TRAIN}"


def describe_nested(images: ImageFiles) -> str:
    """Name the folders with images inside the class folders of *images*; empty if there are none."""
    deep = images.paths[np.char.count(images.paths, b"/") > 1] if len(images) else images.paths
    nested = sorted({"/".join(os.fsdecode(path).split("/")[:2]) for path in deep.tolist()})
    if not nested:
        return ""
    return (
        f"{images.store.root}: images of folders in a class folder count as images of that class: "
        f"{shorten(nested)}; move these folders up if they are classes"
    )


def _scan(store: FileStore, labels: tuple[str, ...], log: Log) -> ImageFiles:
    """List the images of every class as `scan_classes`, and log the folders inside class folders."""
    images = scan_classes(store, labels)
    if nested := describe_nested(images):
        log(nested)
    return images
