"""Class folders: the images of each, sorted, and what the user may not have intended.

The name of a folder is the class of its images or, with a pattern, a part of each file's name is.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.limits import describe_formats
from sopdeploy.images.signatures import count_suffixes, describe_suffixes
from sopdeploy.photos.files import (
    FOLDERS,
    check_labels,
    describe_confusable,
    folder_identity,
    list_files,
    list_images,
    list_subfolders,
    lookalike_key,
    normalize,
)
from sopdeploy.photos.forms import find_leftovers
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.photos.questions import (
    class_in_name,
    suggest_folder,
    suggest_sorting,
    suggest_sorting_by_hand,
)
from sopdeploy.photos.table import describe_other_table, find_other_table


class ClassListing(NamedTuple):
    """What class folders hold, with paths relative to the root of `images`.

    `other_files` are, by class, the files that are no images. `nested` are the folders inside of
    class folders that hold several, `beside` the images of no class. `notes` name what is left
    out and what may be a mistake.
    """

    images: ImageFiles
    other_files: dict[str, list[str]]
    nested: list[str]
    beside: list[bytes]
    notes: list[str]


def list_classes(root: Path, classes_from: str = "") -> ClassListing:
    """List the images of every class folder in *root*, sorted; a class may be empty.

    Folders with one name in two encodings are one class. The images of a folder in a class
    folder are a group, unless it holds all images of the class. A link in a class folder to
    another class folder is not followed. Masks, photographs in another form (`find_leftovers`),
    and classes that hold nothing else are left out, unless *classes_from* is `FOLDERS`.

    If *classes_from* is a regular expression, it finds the class in the name of each image below
    *root*, also of those in no class folder. Folders then tell neither classes nor groups.
    """
    paths_of_class, other_files = _list_folders(root)
    beside, _ = list_files(root)
    notes = list[str]()

    if classes_from != FOLDERS:
        paths_of_class = _without_leftovers(root, paths_of_class, notes)

    # With a pattern, the names of files tell the classes, not the folders.
    if is_pattern(classes_from):
        paths = [*map(os.fsencode, beside), *chain.from_iterable(paths_of_class.values())]
        return _list_by_name(root, sorted(paths), other_files, classes_from, notes)

    # A class folder's entry that holds each image: the folder `cat/x` for `cat/x/1.jpg` and for
    # `cat/x/y/2.jpg`, the file itself for `cat/3.jpg`.
    labels = tuple(sorted(paths_of_class))
    paths = list[bytes]()
    groups = list[bytes]()
    targets = list[int]()
    nested = set[bytes]()
    for target, label in enumerate(labels):
        class_paths = paths_of_class[label]
        entries = [b"/".join(path.split(b"/")[:2]) for path in class_paths]
        if len({*entries}) > 1:
            nested |= {*entries} - {*class_paths}  # the other entries are images themselves
            groups += entries
        else:  # one folder with all images tells nothing: each image is a group of its own
            groups += class_paths
        targets += [target] * len(class_paths)
        paths += class_paths

    no_two_together = len(set(groups)) == len(groups)
    known_groups = None if no_two_together else np.asarray(groups, dtype=np.bytes_)
    images = ImageFiles(
        root, labels, np.asarray(paths, np.bytes_), np.asarray(targets, np.int64), known_groups
    )

    # What the user may not have intended.
    nested_folders = sorted(map(os.fsdecode, nested))
    if nested_folders:
        notes.append(
            f"{root}: images of folders in a class folder count as images of that "
            "class, those of several folders as a group each: "
            f"{shorten(nested_folders)}"
            + (suggest_folder(images) or "; move these folders up if they are classes")
        )
    notes += [f"{root}: {line}" for line in describe_confusable(labels)]
    return ClassListing(images, other_files, nested_folders, [*map(os.fsencode, beside)], notes)


def _without_leftovers(
    root: Path, paths_of_class: dict[str, list[bytes]], notes: list[str]
) -> dict[str, list[bytes]]:
    """Leave out images that are no photographs of their own (`find_leftovers`), and name them in *notes*."""
    for leftover in find_leftovers(root, paths_of_class):
        remaining = {
            label: [path for path in paths if path not in leftover.paths]
            for label, paths in paths_of_class.items()
        }
        # A folder that holds nothing else is no class. One that was empty before stays: it is
        # reported later.
        paths_of_class = {
            label: paths
            for label, paths in remaining.items()
            if paths or not paths_of_class[label]
        }
        where = sorted({str(Path(os.fsdecode(path)).parent) for path in leftover.paths})
        notes.append(
            f"{root}: left out, because they are {leftover.content}: "
            f"{amount(len(leftover.paths), 'image')} in {shorten(where)}"
        )
    return paths_of_class


def _list_folders(root: Path) -> tuple[dict[str, list[bytes]], dict[str, list[str]]]:
    """List the images and the other files of each class folder in *root*, by class."""
    folders = defaultdict[str, list[str]](list)  # names of folders by class
    for name in list_subfolders(root):
        folders[normalize(name)].append(name)
    check_labels(root, sorted(folders))

    # A folder that a link leads to is listed in its own class only.
    visited = {folder_identity(root / name) for names in folders.values() for name in names}
    images = dict[str, list[bytes]]()
    other_files = dict[str, list[str]]()
    for label in sorted(folders):
        images[label] = []
        other_files[label] = []
        for name in folders[label]:
            images_of_folder, others = list_images(root, name, visited)
            images[label] += images_of_folder
            other_files[label] += others
    return images, other_files


def _list_by_name(
    root: Path,
    paths: list[bytes],
    other_files: dict[str, list[str]],
    pattern: str,
    notes: list[str],
) -> ClassListing:
    """Sort the images *paths* in *root* by the classes that *pattern* finds in their names.

    Images without a class, and lookalike classes, are named in *notes*.
    """
    label_of_path = [class_in_name(path, pattern) for path in paths]  # "" without a class
    labels = tuple(sorted(filter(None, set(label_of_path))))
    check_labels(root, labels)
    without = [path for path, label in zip(paths, label_of_path, strict=True) if not label]
    if without and labels:
        names = shorten([*map(os.fsdecode, without)])
        notes.append(
            f"{root}: {amount(len(without), 'image')} left out, in whose names "
            f"{pattern!r} finds no class: {names}"
        )
    kept = [path for path, label in zip(paths, label_of_path, strict=True) if label]
    targets = [labels.index(label) for label in label_of_path if label]
    images = ImageFiles(
        root, labels, np.asarray(kept, np.bytes_), np.asarray(targets, np.int64)
    )
    notes += [f"{root}: {line}" for line in describe_confusable(labels)]
    return ClassListing(images, other_files, [], without, notes)


def is_pattern(classes_from: str) -> bool:
    """Tell whether *classes_from* is a regular expression for the names of files."""
    return classes_from not in ("", FOLDERS)


def describe_class_problems(
    listing: ClassListing, labels: tuple[str, ...], table_hint: str = ""
) -> Iterator[str]:
    """Describe classes of *listing* that are not in *labels*, and empty folders.

    Labels without a folder are described only beside classes that are not in *labels*.

    *table_hint* describes a table that lists the images and is not read; "" without one.
    """
    images = listing.images
    root = images.root
    folders = set(images.labels)
    unknown = sorted(folders - set(labels))

    # Folders that are probably classes under another spelling.
    missing = list[str]()
    for label in sorted(set(labels) - folders):
        alike = [folder for folder in unknown if lookalike_key(folder) == lookalike_key(label)]
        if alike:
            names = " and ".join(map(repr, alike))
            yield (
                f"{root}: the class {names} is {label!r} in the training images; "
                "rename one of them"
            )
            unknown = [folder for folder in unknown if folder not in alike]
        else:
            missing.append(label)

    # Other unknown classes. Missing ones are told with them: these may be the same ones.
    if unknown:
        yield (
            f"{root}: classes {shorten(unknown)} are not training classes, remove "
            "them or train on them"
        )
    if missing and unknown:
        yield f"{root}: training classes {shorten(missing)} are missing, add them"

    # Class folders without images.
    used = set(images.targets.tolist())
    empty = [label for index, label in enumerate(images.labels) if index not in used]
    if empty:
        more = f" (also in {shorten(empty[1:])})" if len(empty) > 1 else ""
        ignored = describe_suffixes(count_suffixes(listing.other_files.get(empty[0], ())))
        only_others = f", only other files ({ignored})" if ignored else ""
        yield (
            f"{root / empty[0]}: no images in this class folder{more}{only_others}; "
            f"add some ({describe_formats()}) or remove the folder"
            + (suggest_folder(images) or table_hint or suggest_sorting(images))
        )


def no_classes_error(root: Path, part: Path | None = None, hint: str = "") -> DataError:
    """Build the error for *root*, or a *part* of it, without classes.

    It advises to use a table that lists the images, if there is one; else to sort them, and
    ends in the *hint* or, without a hint, in the command to sort by hand what images there are.
    """
    images, others = list_images(root)
    table = find_other_table(images, (root / file for file in others))
    other_table = "" if table is None else describe_other_table(root, table)
    unsorted = root if part is None else part
    by_hand = suggest_sorting_by_hand(unsorted) if images else ""
    return DataError(
        f"{unsorted}: holds no class folders and no labels.csv; "
        + (other_table or f"sort the images into one subfolder per class{hint or by_hand}")
    )
