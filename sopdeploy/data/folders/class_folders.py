"""The images of each class: by folders or, if the user says so, by the names of the files."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.files import POINTER_ADVICE
from sopdeploy.base.nearest import nearest_names
from sopdeploy.data.folders.causes import advise_on_files, may_hold_photographs
from sopdeploy.data.photos.contents import Contents
from sopdeploy.data.photos.parts import FOLDERS, PATHS, SUBFOLDERS
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.data.photos.spelling import (
    check_labels,
    describe_confusable,
    lookalike_key,
    normalize,
)
from sopdeploy.errors import amount, shorten
from sopdeploy.images.limits import describe_formats
from sopdeploy.images.signatures import count_suffixes, describe_suffixes


class ClassListing(NamedTuple):
    """The images of the classes in a folder, with paths relative to the root of `images`.

    `beside` are the images of no class, `empty` the folders at the top without images. `notes` name
    what is left out and what may be a mistake.
    """

    images: ImageFiles
    other_files: list[str]
    beside: list[bytes]
    empty: list[str]
    notes: list[str]


def list_classes(contents: Contents, classes_from: str = "") -> ClassListing:
    """List the images of every class in *contents*, sorted.

    The class of an image is the folder at the top that holds it. The images of a folder in a
    class folder are a group, unless it holds all images of the class. If *classes_from* is
    `SUBFOLDERS`, the class is the name of the innermost folder, with `PATHS` its path. If it is a
    regular expression, the class is what it finds in the name of the file (`class_in_name`). Folders
    with one name in two encodings are one class.
    """
    root = contents.root
    by_class = defaultdict[str, list[bytes]](list)  # "": no class
    for path in contents.images:
        by_class[_class_of(path, classes_from)].append(path)
    beside = by_class.pop("", [])
    labels = tuple(sorted(by_class))
    check_labels(root, labels)

    # All images, sorted by class and path
    paths = [path for label in labels for path in sorted(by_class[label])]
    targets = [index for index, label in enumerate(labels) for _ in by_class[label]]
    groups = None
    if classes_from in ("", FOLDERS):
        groups = _group_by_folder(by_class)
    images = ImageFiles(
        root, labels, np.asarray(paths, np.bytes_), np.asarray(targets, np.int64), groups
    )

    # What the user may not have intended
    notes = [f"{root}: {line}" for line in _describe_names(labels)]
    if classes_from == SUBFOLDERS and (joined := find_joined(contents.images)):
        notes.append(
            f"{root}: folders with equal names are one class: {describe_joined(joined)}; "
            f"--set data.classes_from={PATHS} keeps them apart"
        )
    if beside and labels:
        names = shorten([*map(os.fsdecode, beside)])
        notes.append(
            f"{root}: {amount(len(beside), 'image')} without a class left out: {names}"
        )
    empty = [name for name in contents.folders if name not in contents.tops]
    return ClassListing(images, contents.others, beside, empty, notes)


def is_pattern(classes_from: str) -> bool:
    """Tell whether *classes_from*, which names no table, is a regular expression for names of files."""
    return classes_from not in ("", FOLDERS, SUBFOLDERS, PATHS)


def find_joined(paths: Iterable[bytes]) -> dict[str, list[str]]:
    """Find the innermost folders of *paths* that have one name in several folders, which are sorted."""
    parents = defaultdict[str, set[str]](set)
    for folder in {path.rpartition(b"/")[0] for path in paths} - {b""}:
        parent, _, name = normalize(os.fsdecode(folder)).rpartition("/")
        parents[name].add(parent)
    return {name: sorted(several) for name, several in parents.items() if len(several) > 1}


def describe_joined(joined: Mapping[str, Sequence[str]]) -> str:
    """Name the first of the folders that `find_joined` found: `alpha of Greek and Latin, and so on`."""
    name = min(joined)
    one, other, *more = joined[name]
    return f"{name} of {one} and {other}{', and so on' if more or len(joined) > 1 else ''}"


def class_in_name(path: bytes, pattern: str) -> str:
    """Return the text that *pattern* finds in the name of a file without suffix; "" if it finds none.

    Characters that are neither letters nor digits are removed from both ends: `cat` for `cat.1.jpg`.
    """
    name = normalize(os.fsdecode(path)).rpartition("/")[2]
    stem, _ = os.path.splitext(name)  # noqa: PTH122 - no `Path` for each image
    match = re.search(pattern, stem)
    return "" if match is None else re.sub(r"^[\W_]+|[\W_]+$", "", match.group())


def _class_of(path: bytes, classes_from: str) -> str:
    if is_pattern(classes_from):
        return class_in_name(path, classes_from)
    folder = os.fsdecode(path).rpartition("/")[0]
    if classes_from == PATHS:
        return normalize(folder)
    name = folder.rpartition("/")[2] if classes_from == SUBFOLDERS else folder.partition("/")[0]
    return normalize(name)


def _group_by_folder(by_class: dict[str, list[bytes]]) -> NDArray[np.bytes_] | None:
    """Group the images of each class by the folder in the class folder; None if no two are together.

    Each image has the entry of the class folder that holds it: `cat/x` for `cat/x/y/2.jpg`, the file
    itself for `cat/3.jpg`.
    """
    groups = list[bytes]()
    for label in sorted(by_class):
        paths = sorted(by_class[label])
        entries = [b"/".join(path.split(b"/")[:2]) for path in paths]
        # One folder with all images tells nothing: each image is a group of its own.
        groups += entries if len({*entries}) > 1 else paths
    are_together = len({*groups}) < len(groups)
    return np.asarray(groups, np.bytes_) if are_together else None


def _describe_names(labels: Sequence[str]) -> Iterator[str]:
    """Describe *labels* that are easily confused, and those that a user may not see are so written."""
    yield from describe_confusable(labels)
    if spaced := [repr(label) for label in labels if label != label.strip()]:
        yield (
            f"the names of these classes begin or end with a space: {shorten(spaced)}; "
            "rename them, unless you want that"
        )


def describe_class_problems(listing: ClassListing, labels: Sequence[str]) -> Iterator[str]:
    """Describe the classes of *listing*, held-out images, that are not among the training classes *labels*."""
    root = listing.images.root
    unknown = [label for label in listing.images.labels if label not in labels]
    missing = {
        lookalike_key(label): label for label in labels if label not in listing.images.labels
    }
    for label in unknown:
        near = nearest_names(lookalike_key(label), [*missing])[:1]
        hint = (
            f"is it {missing[near[0]]!r}? Rename one of them"
            if near
            else "remove it, or train on it"
        )
        yield f"{root / label}: is not a training class; {hint}"


def describe_empty_classes(root: Path, listing: ClassListing) -> Iterator[str]:
    """Say which folders in *root* without images hold files of formats that are not read, and what to do."""
    for name in listing.empty:
        files = [file for file in listing.other_files if file.partition("/")[0] == name]
        if any(map(may_hold_photographs, files)):
            kinds = describe_suffixes(count_suffixes(files))
            advice = advise_on_files(root, files) or f"add some ({describe_formats()})"
            if POINTER_ADVICE not in advice:
                advice = f"remove the folder, or {advice}"
            yield f"{root / name}: no images in this class folder, only other files ({kinds}); {advice}"
