"""Labeled images for a trained network, with its classes.

Letter: N images.
"""

import os
from functools import cache
from importlib import resources
from pathlib import Path, PurePath

import numpy as np

from sopdeploy.base.project import AS_IT_IS, FolderReading
from sopdeploy.data.folders.causes import no_classes_error
from sopdeploy.data.folders.class_folders import is_pattern, list_classes
from sopdeploy.data.folders.layout import Layout, find_layout
from sopdeploy.data.folders.libraries import open_part
from sopdeploy.data.folders.table import check_has_classes, read_label_table
from sopdeploy.data.photos.files import (
    Log,
    data_folder,
    list_subfolders,
    naming_all_undecodable,
)
from sopdeploy.data.photos.parts import FORMER_FILES, LABELS_FILE, split_names
from sopdeploy.data.photos.photo import ImageFiles, select_classes
from sopdeploy.data.photos.spelling import hint_at_spelling, normalize
from sopdeploy.errors import DataError, shorten
from sopdeploy.images.signatures import count_suffixes, note_skipped

# Tables that are not CSV files: runs of 0.3.0 recorded them, and they are not read any more
FORMER_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml")


def open_evaluation_images(
    root: Path,
    labels: tuple[str, ...],
    *,
    multi_label: bool = False,
    other_classes: bool = False,
    reading: FolderReading = AS_IT_IS,
    log: Log = lambda _line: None,
) -> ImageFiles:
    """Open the labeled images below *root* for a network with the classes *labels*, in their order.

    It opens only the held-out images if the data are split. Classes are matched by name;
    WordNet IDs match the names of ImageNet's classes. With *multi_label*, a table lists
    several classes per image. *log* receives a line about classes without images, about classes
    that are left out, and about the part that is opened. Raises `DataError` if there are no
    images, and for folders that are not classes of the network; with *other_classes* or in an
    official layout, these are left out if a class remains. *reading* says how the training images
    were read. What it names may be missing here, and other images may have class folders instead.
    """
    with naming_all_undecodable(root):
        root = data_folder(root)
        reading = _as_far_as_possible(reading, root, labels)
        root /= reading.folder
        if reading != AS_IT_IS:
            log(f"{root}: read as the training images were")
        leave_out = split_names(reading.leave_out, root)
        known = (*labels, *class_aliases())
        layout = find_layout(root, reading.classes_from, leave_out, known)

        # What tells the classes, and the images
        where, what = layout.contents.root, "the folders"
        labels_of_table = labels if multi_label else None
        if layout.kind in ("table", "part tables"):
            where, what = _table_of(layout), "these classes"
            images = _held_out_of_table(layout, labels_of_table)
        elif multi_label:
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts "
                "several classes per image; list the images and their "
                "classes in this file"
            )
        elif layout.kind == "official":
            images = open_part(layout.official, "held_out", root)
        else:
            images = _held_out_of_folders(layout, log)
        if multi_label:  # the images of the table have exactly these classes
            return images

        # Other classes of an official layout are not mistakes of the user.
        allow_unknown = other_classes or layout.kind == "official"
        images = _match_classes(where, what, images, labels, allow_unknown, log)

    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def _as_far_as_possible(
    reading: FolderReading, root: Path, labels: tuple[str, ...]
) -> FolderReading:
    """Return what of *reading* applies to *root*; nothing if its folders are classes of the network."""
    classes = {*map(normalize, labels), *class_aliases()}
    folders = {*map(normalize, list_subfolders(root))}
    if reading == AS_IT_IS or (folders and folders <= classes):
        return AS_IT_IS

    # `os.path.isdir` and not `Path.is_dir`, which raises for a text that is longer than a name can be
    folder = reading.folder if os.path.isdir(root / reading.folder) else ""  # noqa: PTH112
    inner = root / folder
    classes_from = reading.classes_from
    table = classes_from.partition(":")[0]
    folders_of_table = (inner, *(inner / name for name in list_subfolders(inner)))
    has_table = any(os.path.isfile(one / table) for one in folders_of_table)  # noqa: PTH113
    names_table = PurePath(table).suffix.lower() in FORMER_TABLES
    if (names_table or classes_from == FORMER_FILES) and not has_table:
        classes_from = ""

    # A folder that is a class tells more than the names of files, also beside other folders.
    inner_folders = set(map(normalize, list_subfolders(inner)))
    if is_pattern(classes_from) and not has_table and classes & inner_folders:
        classes_from = ""
    return FolderReading(folder=folder, classes_from=classes_from, leave_out=reading.leave_out)


def _held_out_of_folders(layout: Layout, log: Log) -> ImageFiles:
    """Open the held-out part that is to be evaluated, or all images without one."""
    training, *held_out = layout.parts.values()
    contents = next((part for part in held_out if part.images), training)
    if contents is not layout.contents:
        log(f"{contents.root}: the images in this folder are used")
    listing = list_classes(contents, layout.classes_from)
    if not listing.images.labels:
        raise no_classes_error(contents)
    note_skipped(contents.root, count_suffixes(listing.other_files))
    return listing.images


def _table_of(layout: Layout) -> Path:
    """Return the table of the images to be evaluated: that of the first held-out part, if there are some."""
    if layout.kind == "table":
        return layout.table
    _, *held_out = layout.parts.values()
    contents = next(iter(held_out), next(iter(layout.parts.values())))
    return contents.root / layout.table


def _held_out_of_table(layout: Layout, labels: tuple[str, ...] | None) -> ImageFiles:
    """Open the held-out images of a table, or all if it does not divide them (`read_label_table`).

    With *labels*, they have several of these classes each, otherwise one, whatever it is.
    """
    table = _table_of(layout)
    root = layout.contents.root if layout.kind == "table" else table.parent
    # The last part: `val` after `train`, or the only one.
    opened = read_label_table(
        table, labels, multi_label=labels is not None, root=root, column=layout.column
    )
    note_skipped(root, opened.ignored)
    *_, (name, images) = opened.parts.items()
    check_has_classes(table, name, images)
    return images


def _match_classes(
    where: Path,
    what: str,
    images: ImageFiles,
    labels: tuple[str, ...],
    allow_unknown: bool,
    log: Log,
) -> ImageFiles:
    """Give *images* the classes *labels*; raises `DataError` for others, or if none is left.

    With *allow_unknown*, images of other classes are left out instead, if one class remains.
    *where* and *what* name in messages what tells the classes: a folder or a table.
    """
    # Names of folders are in the form NFC, labels of networks perhaps not.
    aliases = class_aliases()  # of WordNet IDs
    label_of_name = {normalize(label): label for label in labels}
    names = tuple(label_of_name.get(name, aliases.get(name, name)) for name in images.labels)

    unknown = [
        label for label, name in zip(images.labels, names, strict=True) if name not in labels
    ]
    are_allowed = allow_unknown and len(unknown) < len(names)  # at least one class must remain
    hint = hint_at_spelling(unknown, labels)

    if unknown and not are_allowed:
        verb = "are not classes" if len(unknown) > 1 else "is not a class"
        raise DataError(
            f"{where}: {shorten(unknown)} {verb} of the network, which knows "
            f"{shorten(labels)}; remove or rename {what}{hint}",
            lists={"unknown": unknown, "classes": labels},
        )
    if unknown:
        log(f"{where}: left out, because they are not classes: {shorten(unknown)}{hint}")

    matched = select_classes(images.replaced(labels=names), labels)
    if not len(matched):
        raise DataError(f"{where}: holds no images of these classes; add some")
    return matched


@cache
def class_aliases() -> dict[str, str]:
    """Map the WordNet IDs that name ImageNet's class folders to the class names of published weights, and back."""
    text = (
        resources.files("sopdeploy.data.folders")
        .joinpath("imagenet_classes.txt")
        .read_text("utf-8")
    )
    name_of_id = dict(line.split(" ", 1) for line in text.splitlines())
    return name_of_id | {name: wordnet_id for wordnet_id, name in name_of_id.items()}
