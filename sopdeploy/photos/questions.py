"""Folders of which nobody can tell where the classes are: what is asked, and the option that goes on.

What repeats in all classes is no object, and folders that differ in a number only may be the
parts of an archive.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import NamedTuple

import numpy as np

from sopdeploy.errors import DataError, shorten
from sopdeploy.photos.files import FOLDERS, TRAIN, TRAINING, is_general, normalize, part_kind
from sopdeploy.photos.photo import ImageFiles

# Where the class may be in a name: before the first digit, or behind the last one.
NAME_PATTERNS = (r"^\D+", r"\D+$")
FEW_WORDS = 3  # images per class that names must tell on average
# Share of the images in the subfolders of one folder, beside which other folders are hardly classes
NEARLY_ALL = 0.9
IN_NAMES = 0.9  # share of the images whose names have a class
GO_ON = f"add --set data.classes_from={FOLDERS}"


class _Subfolders(NamedTuple):
    """The subfolders of `folder`, relative to the root, that may be the classes.

    `are_in_all` tells that the other folders with subfolders, one or more, have these names,
    too, `hold_nearly_all` that they hold the share `NEARLY_ALL` of the images. Both are false for
    names that differ in a number only.
    """

    folder: str
    names: list[str]
    are_in_all: bool
    hold_nearly_all: bool


def ask_about_subfolders(images: ImageFiles) -> None:
    """Raise `DataError` if folders in class folders may be the classes.

    That is if all class folders hold the same ones, or if those of one hold nearly all images:
    other folders, such as `docs` or `logo`, may then be no classes. Folders that differ in a
    number only are the objects of a class.
    """
    subfolders = _find_subfolders(images)
    if subfolders is None:
        return

    if subfolders.are_in_all:
        reason = "all of them hold"
    elif subfolders.hold_nearly_all:
        reason = "nearly all images are in"
    else:
        return
    raise DataError(
        f"{images.root}: {shorten(images.labels)} would be the classes, but "
        f"{reason} {shorten(subfolders.names)}; {GO_ON} if they "
        f"are{suggest_folder(images)}"
    )


def ask_about_held_out_classes(images: ImageFiles, held_out: Sequence[str]) -> None:
    """Raise `DataError` if folders that are named as *held_out* ones would be classes beside others."""
    filled = [images.labels[index] for index in np.flatnonzero(images.class_counts())]
    doubtful = [label for label in filled if label in map(normalize, held_out)]
    others = [label for label in filled if label not in doubtful]
    if not doubtful or not others:
        return

    # Parts of a data set without classes, such as train/ and val/.
    if all(part_kind(label) in TRAINING for label in others):
        raise DataError(
            f"{images.root}: {shorten(filled)} hold no class folders; sort the "
            "images of each into one subfolder per "
            f"class{suggest_sorting_by_hand(images.root / others[0])}; {GO_ON} if "
            "they are the classes"
        )

    # A class with such a name, or other photographs of the classes.
    raise DataError(
        f"{images.root}: {shorten(doubtful)} would be a class, as "
        f"{shorten(others)}; {GO_ON} if it is; if it holds other photographs "
        f"of {shorten(others)}, move {shorten(others)} into a folder {TRAIN} "
        "beside it"
    )


def ask_about_general_names(images: ImageFiles, hint: str) -> None:
    """Raise `DataError` if a folder beside others is called `images` or the like, as that of all classes is.

    The message ends in *hint*.
    """
    filled = [images.labels[index] for index in np.flatnonzero(images.class_counts())]
    general = [label for label in filled if is_general(label)]
    if general and len(filled) > len(general):
        raise DataError(
            f"{images.root}: {shorten(filled)} would be the classes, but "
            f"{shorten(general)} may hold the images of all; {GO_ON} if they "
            f"are{suggest_folder(images) or hint}"
        )


def ask_about_parts_inside(images: ImageFiles) -> None:
    """Raise `DataError` if class folders hold folders of training images, such as `cat/train`."""
    # The folders below class folders that are named as parts are.
    parents = {path.rpartition(b"/")[0] for path in images.paths.tolist()}
    paths = [PurePosixPath(os.fsdecode(parent)) for parent in parents]
    folders = {folder for path in paths for folder in (path, *path.parents)}
    inside = sorted(
        folder.as_posix()
        for folder in folders
        if len(folder.parts) > 1 and part_kind(folder.name)
    )
    training = [path for path in inside if part_kind(path.rpartition("/")[2]) in TRAINING]

    # A folder that is the only one with images may hold the data set itself.
    if training and np.count_nonzero(images.class_counts()) > 1:
        above, _, part = training[0].rpartition("/")
        train_there = f"run: sopdeploy train --data {quote(str(images.root / above))}"
        if "/" in above:  # the whole data set may be in a class folder
            advice = f"; if {part} holds the training images, {train_there}"
        else:
            advice = f"; put the parts above the classes, such as {part}/{above}"
            if len({path.rpartition("/")[0] for path in inside}) == 1:
                advice += f", or, if {above} is the whole data set, {train_there}"
        advice = suggest_folder(images) or advice
        raise DataError(
            f"{images.root}: class folders hold parts of the data: "
            f"{shorten(inside)}; {GO_ON} if {shorten(images.labels)} are the "
            f"classes{advice}"
        )


def ask_about_numbered_folders(images: ImageFiles, table_hint: str) -> None:
    """Raise `DataError` if the class folders seem to be the parts of an archive.

    That is if their names have a word, differ in a number only, and one of these holds:

    - *table_hint* is not empty: it describes a table that lists the images without these names,
    - names of files in each of the folders begin with the same words, two or more, which may be the
      classes (`suggest_names`).
    """
    # Names without two letters in a row, such as `1` and `a1`, are classes.
    without_numbers = {*map(_without_digits, images.labels)}
    if len(without_numbers) > 1 or not re.search(r"[^\W\d_]{2}", next(iter(without_numbers))):
        return

    # What the names of files begin with in all folders.
    words_of_class = defaultdict[str, set[str]](set)
    for path in images.paths.tolist():
        label = os.fsdecode(path).partition("/")[0]
        words_of_class[label].add(class_in_name(path, NAME_PATTERNS[0]))
    words = {word for word in set.intersection(*words_of_class.values()) if word}
    hint = table_hint or suggest_names(images.root, images.paths.tolist())
    if hint and (table_hint or len(words) > 1):
        raise DataError(
            f"{images.root}: {shorten(images.labels)} would be the classes, "
            f"but may be parts of one archive; {GO_ON} if they are "
            f"classes{hint}"
        )


def _without_digits(name: str) -> str:
    return re.sub(r"\d+", "", name)


def suggest_folder(images: ImageFiles, advice: str = "run: sopdeploy train --data") -> str:
    """Give *advice* with the folder below the root of *images* whose subfolders may be the classes, or "".

    For `archive/images/rose/1.jpg`, it is `archive/images`. There is none if all subfolders are
    parts. Unless the subfolders hold nearly all images, there is none either if a class folder
    holds images itself, or if those of several class folders share no name: they are then the
    objects of each class.
    """
    subfolders = _find_subfolders(images)
    if subfolders is None or all(map(part_kind, subfolders.names)):
        return ""
    folder = subfolders.folder
    while part_kind(folder.rpartition("/")[2]):  # a part of the data set, which is above it
        folder = folder.rpartition("/")[0]
    names = shorten(subfolders.names)

    # Folders beside it may hold other images of the same classes.
    inside = os.fsencode(folder + "/")
    count = sum(path.startswith(inside) for path in images.paths.tolist())
    share = f" (of {count:,} of {len(images):,} images)" if count < len(images) else ""
    return f"; if {names} are the classes{share}, {advice} {quote(str(images.root / folder))}"


def _find_subfolders(images: ImageFiles) -> _Subfolders | None:
    """Find the subfolders that may be the classes; None without any.

    They are two or more, those of one folder: of the folders with several subfolders, that with
    the most images. One of these holds, too:

    - no class folder holds images itself, and other folders share some of the names, or there is
      no other class,
    - they hold nearly all images (`NEARLY_ALL`), and differ in words.
    """
    # Images of each subfolder, by the path of its parent.
    counts = defaultdict[str, Counter[str]](Counter)
    for path in images.paths.tolist():
        parent, _, subfolder = os.fsdecode(path).rpartition("/")[0].rpartition("/")
        counts[parent][subfolder] += 1
    # Images that are in class folders themselves, by class.
    direct = counts.pop("", Counter[str]())
    if not counts:
        return None

    best = max(counts, key=lambda parent: (len(counts[parent]) > 1, counts[parent].total()))
    names = counts.pop(best)
    other_names = set[str]().union(*counts.values())
    is_only_class = len(set(images.targets.tolist())) == 1
    is_shared = not direct and (is_only_class or bool(names.keys() & other_names))
    differ_in_words = len(set(map(_without_digits, names))) > 1
    hold_nearly_all = (
        not is_only_class and differ_in_words and names.total() >= NEARLY_ALL * len(images)
    )
    if len(names) < 2 or not (is_shared or hold_nearly_all):
        return None

    are_in_all = (
        is_shared
        and differ_in_words
        and bool(counts)
        and all(names.keys() == one.keys() for one in counts.values())
    )
    return _Subfolders(best, sorted(names), are_in_all, hold_nearly_all)


def suggest_sorting_by_hand(folder: Path) -> str:
    """Say how the images of *folder* can be sorted into classes."""
    return f", by hand or in a browser: sopdeploy label {quote(str(folder))} --photos sorted"


def suggest_sorting(images: ImageFiles) -> str:
    """Say that *images* can be sorted into classes if only one folder at the top holds some; else ""."""
    filled = np.flatnonzero(images.class_counts())
    if len(filled) != 1:
        return ""
    folders = {images.path(index).parent for index in range(len(images))}
    by_hand = suggest_sorting_by_hand(folders.pop()) if len(folders) == 1 else ""
    return (
        f"; if {images.labels[filled[0]]} holds those of all classes, sort them "
        f"into one subfolder per class{by_hand}"
    )


def suggest_names(root: Path, paths: Sequence[bytes]) -> str:
    """Give the option that reads the classes from the names of the images *paths*, or "".

    It is given if a pattern finds several texts, each in `FEW_WORDS` names on average, and hardly
    any name has none (`IN_NAMES`).
    """
    for pattern in NAME_PATTERNS:
        counts = Counter(class_in_name(path, pattern) for path in paths)
        num_without = counts.pop("", 0)
        may_be_classes = len(counts) > 1 and counts.total() >= FEW_WORDS * len(counts)
        if may_be_classes and num_without <= (1 - IN_NAMES) * len(paths):
            return (
                f"; if {shorten(sorted(counts))} in the names of the files are the "
                f"classes, run: sopdeploy train --data {quote(str(root))} --set "
                f"data.classes_from={quote(pattern)}"
            )
    return ""


def class_in_name(path: bytes, pattern: str) -> str:
    """Return the text that *pattern* finds in the name of a file without suffix; "" if it finds none.

    Characters that are neither letters nor digits are removed from both ends: `cat` for `cat.1.jpg`.
    """
    name = normalize(os.fsdecode(path)).rpartition("/")[2]
    stem, _ = os.path.splitext(name)  # noqa: PTH122 - no `Path` for each image
    match = re.search(pattern, stem)
    return "" if match is None else re.sub(r"^[\W_]+|[\W_]+$", "", match.group())
