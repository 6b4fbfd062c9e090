"""Images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/ (`parts`).

DIR, train/ and val/ may also be tar archives or folders of archives. A folder with `labels.csv` holds images
that this table lists with their classes (`label_table`).
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.label_table import has_label_table, read_label_table, split_table
from sopdeploy.data.folder_store import LABELS_FILE, FolderStore, Log, ignore
from sopdeploy.data.image_files import (
    FileStore,
    ImageFiles,
    count_ignored_files,
    describe_ignored_files,
    divide,
)
from sopdeploy.data.parts import TRAIN, Parts, find_parts, open_part
from sopdeploy.data.subset import ClassSubset
from sopdeploy.data.tar import is_tar, open_tars
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.files import expand_user
from sopdeploy.images.limits import SUFFIXES

UNSPLIT = "all"  # the name of the only part if there are no folders train and val


class FolderConfig(ClassSubset):
    """Location of the images and selection of the held-out ones.

    Without a folder of held-out images, the fraction `hold_out` of every class is selected by
    `hold_out_seed`. It is not the seed of the run, so all runs are evaluated on the same images.
    `skip_corrupt` leaves out unreadable images.
    """

    kind: Literal["folder"]
    path: Path | None = None
    hold_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    hold_out_seed: int = 0
    skip_corrupt: bool = False


def open_folder(config: FolderConfig, log: Log = ignore) -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of class indices.

    Hidden folders and files without an image suffix are ignored; what else is not used is logged. Raises
    `DataError` if the images cannot be used.
    """
    if config.path is None:
        raise ConfigError(
            "data.path: not set; give the folder with one subfolder per class", remedies={"data": None}
        )
    store = open_store(expand_user(config.path))
    if has_label_table(store):
        split = split_table(read_label_table(store), config.hold_out, config.hold_out_seed)
        if split.train.targets.ndim == 1:
            log(f"{store.root / LABELS_FILE}: every image has one class, so the network predicts one")
        return split
    folders = open_class_folders(store, held_out=1)
    for line in folders.notes:
        log(line)
    if folders.ignored:
        ignored = describe_ignored_files(folders.ignored)
        log(f"{store.root}: ignored files without an image suffix: {ignored}")
    if folders.problems:
        raise DataError("; ".join(folders.problems))
    train, *held_out = folders.parts.values()
    if held_out:
        return Split(train=train, held_out=held_out[0])
    train, divided = divide(train, config.hold_out, config.hold_out_seed)
    return Split(train=train, held_out=divided, divided=True)


def open_store(path: Path) -> FileStore:
    """Open a folder, a tar archive, or a folder that holds archives and no subfolders."""
    if path.is_file() and is_tar(path):
        return open_tars(path, [path])
    if not path.is_dir():
        problem = "neither a folder nor an uncompressed tar file" if path.exists() else "no such folder"
        raise DataError(
            f"{path}: {problem}; give a folder or tar file with one subfolder of images per class"
        )
    store = FolderStore(path, lambda folder: open_store(path / folder))
    if not store.folders():
        archives = sorted(file for file in path.iterdir() if file.is_file() and is_tar(file))
        if archives:
            return open_tars(path, archives)
    return store


class ClassFolders(NamedTuple):
    """Images of a folder with class folders, by part, the training images first.

    `problems` say why it cannot be used for training, `notes` what may not be as intended. `ignored` counts
    the files without an image suffix by suffix.
    """

    parts: dict[str, ImageFiles]
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    ignored: Mapping[str, int] = {}


def open_class_folders(store: FileStore, held_out: int | None = None) -> ClassFolders:
    """Open the class folders of *store*, or those in its training and first *held_out* held-out folders.

    Raises `DataError` if there are fewer than two classes, or held-out images only.
    """
    folders = find_parts(store)
    notes = list(_describe_parts(store, folders))
    if folders.held_out and not folders.train and not folders.others:
        raise DataError(
            f"{store.root}: holds {folders.held_out[0]} but no {TRAIN}; put the training images there"
        )
    if folders.train:
        names = (folders.train, *folders.held_out[:held_out])
        stores = {name: open_part(store, name) for name in names}
    else:
        stores = {UNSPLIT: store}
    labels = class_names(next(iter(stores.values())))
    parts = {name: list_classes(part, tuple(part.folders())) for name, part in stores.items()}
    problems = [problem for images in parts.values() for problem in class_problems(images, labels)]
    notes += filter(None, map(_describe_nested, parts.values()))
    ignored = Counter[str]()
    for images in parts.values():
        ignored.update(count_ignored_files(images.store, images.labels))
    return ClassFolders(parts, problems, notes, ignored)


def class_problems(images: ImageFiles, labels: tuple[str, ...]) -> Iterator[str]:
    """Describe classes of *images* that are not in *labels*, labels without a folder, and empty folders."""
    root, folders = images.store.root, set(images.labels)
    unknown, missing = sorted(folders - set(labels)), sorted(set(labels) - folders)
    if unknown:
        yield f"{root}: classes {shorten(unknown)} are not training classes, remove them or train on them"
    if missing:
        yield f"{root}: training classes {shorten(missing)} are missing, add them"
    empty = [images.labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        same = f" (also in {shorten(empty[1:])})" if len(empty) > 1 else ""
        ignored = describe_ignored_files(count_ignored_files(images.store, empty[:1]))
        others = f", only other files ({ignored})" if ignored else ""
        yield (
            f"{root / empty[0]}: no images in this class folder{same}{others}; "
            f"add some ({', '.join(SUFFIXES)}) or remove the folder"
        )


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


def list_classes(store: FileStore, labels: tuple[str, ...]) -> ImageFiles:
    """List the images of every class, sorted; a class may be empty."""
    by_class = [store.list_files(label)[0] for label in labels]
    paths = np.asarray([path for files in by_class for path in files], dtype=np.bytes_)
    targets = np.repeat(np.arange(len(labels)), [len(files) for files in by_class])
    return ImageFiles(store, labels, paths, targets)


def _describe_parts(store: FileStore, parts: Parts) -> Iterator[str]:
    """Say which folders of *store* training does not use, or uses as classes despite their names."""
    unused = (*parts.held_out[1:], *parts.others)
    if parts.train and unused:
        used = " and ".join((parts.train, *parts.held_out[:1]))
        yield f"{store.root}: training uses {used} only, not {shorten(unused)}"
    elif parts.held_out and parts.others:
        yield f"{store.root}: {shorten(parts.held_out)} counts as a class, because there is no folder {TRAIN}"


def _describe_nested(images: ImageFiles) -> str:
    """Name the folders with images inside the class folders of *images*; empty if there are none."""
    deep = images.paths[np.char.count(images.paths, b"/") > 1] if len(images) else images.paths
    nested = sorted({"/".join(os.fsdecode(path).split("/")[:2]) for path in deep.tolist()})
    if not nested:
        return ""
    return (
        f"{images.store.root}: images of folders in a class folder count as images of that class: "
        f"{shorten(nested)}; move these folders up if they are classes"
    )
