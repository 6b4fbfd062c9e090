"""The labeled images of a folder, for commands without a recipe: `eval`, `calibrate`, `data check`."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from sopdeploy.data.datasets.fine_grained import LAYOUTS, find_fine_grained
from sopdeploy.data.datasets.folder import list_classes, match_classes, open_store
from sopdeploy.data.datasets.imagenet import TRAIN_FOLDERS, class_aliases, find_list, open_validation
from sopdeploy.data.datasets.label_table import has_label_table, read_label_table
from sopdeploy.data.folder_store import LABELS_FILE, Log, OpenOptions, ignore
from sopdeploy.data.image_files import FileStore, ImageFiles
from sopdeploy.data.parts import find_parts, open_part
from sopdeploy.errors import DataError, shorten
from sopdeploy.files import expand_user


def detect_kind(path: Path) -> str | None:
    """Find the `data.kind` of the official layout in the folder *path*, if there is one."""
    kinds = [kind for kind in LAYOUTS if find_fine_grained(path, kind)]
    return kinds[0] if kinds else "imagenet" if find_list(path) else None


def open_official(path: Path, options: OpenOptions) -> dict[str, ImageFiles]:
    """Open the parts of an official layout in the folder *path* by name; empty if there is none.

    The last part has the official test or validation images.
    """
    for kind in LAYOUTS:
        if found := find_fine_grained(path, kind):
            split = found[1](found[0], options)
            parts = {"train": split.train, "test": split.held_out}
            return {name: part for name, part in parts.items() if isinstance(part, ImageFiles)}
    listing = find_list(path)
    if listing is None:
        return {}
    held_out = open_validation(path, listing, options)
    train = next((path / name for name in TRAIN_FOLDERS if (path / name).exists()), None)
    images = {} if train is None else {"train": match_classes(open_store(train, options), held_out.labels)}
    return {**images, "val": held_out}


def open_evaluation_images(
    root: Path, labels: tuple[str, ...], *, multi_label: bool = False, log: Log = ignore
) -> ImageFiles:
    """Open the labeled images below *root* for a network with the classes *labels*, in their order.

    `eval`, `calibrate` and `export --evaluate` read folders with this function. Of a folder with parts, such
    as train/ and val/, of an official layout and of a `labels.csv` with a column `split`, the held-out images
    are opened. Classes are matched by name; WordNet IDs match the names of ImageNet's classes. With
    *multi_label*, the network predicts several classes per image, which `labels.csv` lists.

    *log* receives a line about what is not as expected: classes without images, which part is opened, and
    images of an official layout that are of no class of the network. Raises `DataError` for folders that are
    no class of the network, or if there are no images.
    """
    root = expand_user(root)
    if multi_label:
        store = open_store(root, OpenOptions(log=log))
        if not store.label_tables():
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts several classes per image; list the "
                "images and their classes in this file"
            )
        return read_label_table(store, labels, multi_label=True).held_out()
    official = open_official(root, OpenOptions(log=log))
    if official:
        found = list(official.values())[-1]
    else:
        store = _open_held_out(open_store(root, OpenOptions(log=log)), labels, log)
        if has_label_table(store):
            found = read_label_table(store, labels, multi_label=False).held_out()
        else:
            found = list_classes(store, tuple(store.folders()))
    images = _match(root, found, labels, must_match=not official)
    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def open_any_images(root: Path) -> ImageFiles:
    """Open all images below *root*, without their classes; raises `DataError` if there are none."""
    store = open_store(expand_user(root), OpenOptions())
    paths = np.asarray(store.list_files("")[0], dtype=np.bytes_)
    if not len(paths):
        raise DataError(f"{root}: holds no images; sort images into one subfolder per class")
    return ImageFiles(store, ("",), paths, np.zeros(len(paths), dtype=np.int64))


def _open_held_out(store: FileStore, labels: tuple[str, ...], log: Log) -> FileStore:
    """Open the part of *store* with the held-out images, if its folders are parts and not classes."""
    if set(store.folders()) <= set(labels):
        return store
    parts = find_parts(store)
    if not parts.held_out or (not parts.train and parts.others):
        return store
    part: FileStore = open_part(store, parts.held_out[0])
    log(f"{part.root}: the images in this folder are used")
    return part


def _match(root: Path, images: ImageFiles, labels: tuple[str, ...], *, must_match: bool) -> ImageFiles:
    """Give *images* the classes *labels*; raises `DataError` if *must_match* and a class is no label."""
    if not images.labels:
        raise DataError(f"{root}: holds no class folders; sort the images into one subfolder per class")
    position = {label: index for index, label in enumerate(labels)}
    aliases = class_aliases()
    new = [position.get(name, position.get(aliases.get(name, ""), -1)) for name in images.labels]
    unknown = [name for name, index in zip(images.labels, new, strict=True) if index < 0]
    if unknown and (must_match or len(unknown) == len(new)):
        verb = "are not classes" if unknown[1:] else "is no class"
        raise DataError(
            f"{root}: {shorten(unknown)} {verb} of the network, which knows {shorten(labels)}; remove or "
            "rename the folders",
            lists={"unknown": unknown, "classes": labels},
        )
    targets = np.asarray(new, dtype=np.int64)[images.targets.astype(np.int64)]
    if not (targets >= 0).any():
        raise DataError(f"{root}: holds no images of these classes; add some")
    chosen = images.select(targets >= 0)
    return replace(chosen, labels=labels, targets=targets[targets >= 0])
