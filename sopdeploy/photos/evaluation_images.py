"""Images for a trained network: labeled ones, with its classes; those of no class; or any.

Letter: N images.
"""

import os
from collections.abc import Collection
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import count_suffixes, note_skipped
from sopdeploy.photos.class_folders import is_pattern, list_classes, no_classes_error
from sopdeploy.photos.files import (
    FILES,
    FOLDERS,
    LABELS_FILE,
    Log,
    data_folder,
    find_parts,
    hint_at_spelling,
    list_images,
    list_subfolders,
    naming_all_undecodable,
    normalize,
    part_folder,
    split_names,
)
from sopdeploy.photos.kept import SAMPLE_FOLDER, is_kept_as_unsure
from sopdeploy.photos.libraries import detect_kind, open_part
from sopdeploy.photos.photo import ImageFiles, select_classes
from sopdeploy.photos.table import check_has_classes, read_label_table
from sopdeploy.photos.table_search import TABLE_SUFFIXES, find_table, named_table
from sopdeploy.project import AS_IT_IS, FolderReading

ANY_IMAGES = "JPEG or PNG files, with or without subfolders"


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
    WordNet IDs match the names of ImageNet's classes. With *multi_label*, `labels.csv` lists
    several classes per image. *log* receives a line about classes without images, about classes
    that are left out, and about the part that is opened. Raises `DataError` if there are no
    images, and for folders that are no class of the network; with *other_classes* or in an
    official layout, these are left out if a class remains. *reading* says how the training images
    were read. What it names may be missing here, and other images may have class folders instead.
    """
    with naming_all_undecodable(root):
        root = data_folder(root)
        reading = _as_far_as_possible(reading, root, labels)
        root /= reading.folder
        if reading != AS_IT_IS:
            log(f"{root}: read as the training images were")
        if not reading.classes_from and not holds_classes(root):
            raise no_classes_error(root)
        return _open_evaluation_images(root, labels, multi_label, other_classes, reading, log)


def _as_far_as_possible(
    reading: FolderReading, root: Path, labels: tuple[str, ...]
) -> FolderReading:
    """Return what of *reading* applies to *root*; nothing if its folders are classes of the network."""
    classes = {*map(normalize, labels), *class_aliases()}
    folders = {*map(normalize, list_subfolders(root))}
    if reading == AS_IT_IS or (folders and folders <= classes):
        return AS_IT_IS

    # The data set, and what it names: a table, a file beside each image, folders. `Path.is_dir`
    # raises for a text that is longer than a name can be.
    folder = reading.folder if os.path.isdir(root / reading.folder) else ""  # noqa: PTH112
    inner = root / folder
    classes_from = reading.classes_from
    has_table = named_table(inner, classes_from) is not None
    names_table = PurePath(classes_from.partition(":")[0]).suffix.lower() in TABLE_SUFFIXES
    if (names_table or classes_from == FILES) and not has_table:
        classes_from = ""

    # A folder that is a class tells more than the names of files, also beside other folders.
    inner_folders = set(map(normalize, list_subfolders(inner)))
    if is_pattern(classes_from) and not has_table and classes & inner_folders:
        classes_from = ""

    left_out = [
        name
        for name in split_names(reading.leave_out, inner)
        if os.path.isdir(inner / name)  # noqa: PTH112
    ]
    return FolderReading(folder=folder, classes_from=classes_from, leave_out=",".join(left_out))


def _open_evaluation_images(
    root: Path,
    labels: tuple[str, ...],
    multi_label: bool,
    other_classes: bool,
    reading: FolderReading,
    log: Log,
) -> ImageFiles:
    """Do what `open_evaluation_images` says, in a *root* that holds what *reading* names."""
    leave_out = split_names(reading.leave_out, root)
    named = named_table(root, reading.classes_from)
    if multi_label and named:
        table, column = named
        return _held_out_of_table(table, labels, root=root, column=column)
    if multi_label:
        folder = _held_out_folder(root, labels, leave_out, log)
        found = find_table(root) or find_table(folder)
        if found is None:
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts "
                "several classes per image; list the images and their "
                "classes in this file"
            )
        # With *labels*, the images of the table have exactly these classes.
        return _held_out_of_table(found, labels)

    # One class per image: the official layout of a public data set, a table, or class folders.
    layout = None if named else detect_kind(root)  # None for a folder of the user
    where, what = root, "the folders"
    if named:
        where, column = named
        what = "these classes"
        images = _held_out_of_table(where, root=root, column=column)
    elif layout is not None:
        images = open_part(layout, "held_out", root)
    else:
        folder = root
        if reading.classes_from != FOLDERS:
            folder = _held_out_folder(root, labels, leave_out, log)
        own_table = None if reading.classes_from else find_table(folder)
        if own_table is not None:
            where, what = own_table, "these classes"
            images = _held_out_of_table(own_table)
        else:
            listing = list_classes(folder, reading.classes_from, leave_out)
            images = listing.images
            note_skipped(
                root, count_suffixes(chain.from_iterable(listing.other_files.values()))
            )

    # Other classes of an official layout are no mistakes of the user.
    allow_unknown = other_classes or layout is not None
    images = _match_classes(where, what, images, labels, allow_unknown, log)
    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def _held_out_folder(
    root: Path, labels: tuple[str, ...], leave_out: Collection[str], log: Log
) -> Path:
    """Return the folder in *root* that has the held-out images, such as val/; without one, *root* itself.

    It is none of *leave_out*.
    """
    names = {normalize(name) for name in list_subfolders(root) if name not in leave_out}
    # A single folder of folders that is no class is the data set itself, as in training.
    known = {normalize(label) for label in labels} | {*class_aliases()}
    is_wrapped = len(names) == 1 and not names & known
    if is_wrapped and not find_parts(root, leave_out).held_out and not find_table(root):
        (inner,) = (root / name for name in list_subfolders(root) if name not in leave_out)
        if list_subfolders(inner):
            return _held_out_folder(inner, labels, (), log)
    # If each subfolder is a class, none is a part, even if it is named val.
    if names <= {normalize(label) for label in labels}:
        return root
    parts = find_parts(root, leave_out)
    # Beside other folders, and without train/, val/ is a class.
    val_is_a_class = parts.others and not parts.train
    if val_is_a_class or not parts.held_out:
        return root
    folder = part_folder(root, parts.held_out[0])
    log(f"{folder}: the images in this folder are used")
    return folder


def _held_out_of_table(
    table: Path,
    labels: tuple[str, ...] | None = None,
    *,
    root: Path | None = None,
    column: str = "",
) -> ImageFiles:
    """Open the held-out images of *table*, or all if it does not divide them (`read_label_table`).

    With *labels*, they have several of these classes each, otherwise one, whatever it is.
    """
    # The last part: `val` after `train`, or the only one.
    opened = read_label_table(
        table, labels, multi_label=labels is not None, root=root, column=column
    )
    note_skipped(root or table.parent, opened.ignored)
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
        verb = "are not classes" if len(unknown) > 1 else "is no class"
        raise DataError(
            f"{where}: {shorten(unknown)} {verb} of the network, which knows "
            f"{shorten(labels)}; remove or rename {what}{hint}",
            lists={"unknown": unknown, "classes": labels},
        )
    if unknown:
        log(f"{where}: left out, of no class: {shorten(unknown)}{hint}")

    matched = select_classes(images.replaced(labels=names), labels)
    if not len(matched):
        raise DataError(f"{where}: holds no images of these classes; add some")
    return matched


def holds_classes(root: Path) -> bool:
    """Tell whether the folder *root* has subfolders, a file with labels, or an official layout."""
    return bool(list_subfolders(root) or find_table(root) or detect_kind(root) is not None)


@cache
def class_aliases() -> dict[str, str]:
    """Map the WordNet ID of each ImageNet class to the name that published weights have, and back."""
    text = (
        resources.files("sopdeploy.photos").joinpath("imagenet_classes.txt").read_text("utf-8")
    )
    name_of_id = dict(line.split(" ", 1) for line in text.splitlines())
    return name_of_id | {name: wordnet_id for wordnet_id, name in name_of_id.items()}


def open_any_images(root: Path) -> ImageFiles:
    """Open all images below *root*, without their classes; raises `DataError` if there are none."""
    root = data_folder(root, ANY_IMAGES)
    with naming_all_undecodable(root):
        listed, others = list_images(root)
    note_skipped(root, count_suffixes(others))
    paths = np.asarray(listed, dtype=np.bytes_)
    if not len(paths):
        raise DataError(f"{root}: holds no images; give a folder with {ANY_IMAGES}")
    return ImageFiles(root, ("",), paths, np.zeros(len(paths), dtype=np.int64))


class UnknownImages(NamedTuple):
    """The images of no class, None if none remain, and a note about those that were left out, if any."""

    images: ImageFiles | None
    note: str


def open_unknown(root: Path) -> UnknownImages:
    """Open the images of no class below *root*, without those that a server kept because of their scores.

    The live network rejected most of these, so that the share that a network rejects would seem
    higher than it is. Those of the uniform sample remain. Raises `DataError` if the folder has no
    images at all.
    """
    images = open_any_images(root)
    paths = [images.path(index) for index in range(len(images))]

    # A kept photograph has an ID as its name. Those in `SAMPLE_FOLDER` were drawn whatever their
    # scores.
    are_biased = [
        path.parent.name != SAMPLE_FOLDER and is_kept_as_unsure(path.name) for path in paths
    ]
    num_left_out = sum(are_biased)
    num_remaining = len(images) - num_left_out
    if not num_left_out:
        return UnknownImages(images, "")

    note = (
        f"{root}: {amount(num_left_out, 'photo')} left out, because a server "
        f"kept them outside of its sample, mostly as unknown; {num_remaining:,} "
        "remain"
    )
    remaining = images.select(~np.asarray(are_biased)) if num_remaining else None
    return UnknownImages(remaining, note)
