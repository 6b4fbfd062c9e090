"""Images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/ (`files`).

A folder with `labels.csv`, or an export of a label tool, holds images that this table lists
with their classes (`table`), and official layouts are read by torchvision (`libraries`).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.limits import describe_formats
from sopdeploy.images.signatures import (
    count_suffixes,
    describe_skipped,
    describe_suffixes,
    note_skipped,
)
from sopdeploy.photos.files import (
    SAMPLE_FOLDER,
    TRAIN,
    TRAINING,
    Log,
    Parts,
    check_labels,
    data_folder,
    describe_confusable,
    find_parts,
    folder_identity,
    hint_at_spelling,
    holds_images,
    is_kept_photograph,
    list_images,
    list_outputs,
    list_subfolders,
    lookalike_key,
    normalize,
    part_folder,
    part_kind,
)
from sopdeploy.photos.libraries import detect_kind, open_part
from sopdeploy.photos.photo import ImageFiles, Split, find_unreadable, select_classes
from sopdeploy.photos.table import (
    LABELS_FILE,
    SPLIT,
    UNSPLIT,
    OpenedParts,
    check_has_classes,
    describe_other_table,
    find_table,
    read_label_table,
)

ANY_IMAGES = "JPEG or PNG files, with or without subfolders"


def open_folder(path: Path) -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of
    class indices. Without a folder of held-out images, classes of a single image are left out.
    Raises `DataError`.
    """
    root = data_folder(path)
    opened = open_parts(root, max_held_out=1)
    notes = [*opened.notes]
    if opened.ignored:
        notes.append(f"{root}: {describe_skipped(opened.ignored)}")
    if opened.problems:  # only then, because training finds unreadable images itself
        unreadable = (
            error for part in opened.parts.values() for error in find_unreadable(part).values()
        )
        problems = [*opened.problems, *unreadable]
        raise DataError(shorten(problems, "; "), lists={"problems": problems})
    train, *held_out = opened.parts.values()
    if held_out:
        return Split(train=train, held_out=held_out[0], notes=tuple(notes))
    # Of a class of one image, none could be held out.
    counts = train.class_counts().tolist()
    kept = tuple(label for label, count in zip(train.labels, counts, strict=True) if count > 1)
    small = [label for label in train.labels if label not in kept]
    if len(kept) < 2:
        raise DataError(
            f"{root}: a classifier needs two classes of two images or more; add images of {shorten(small)}"
        )
    if not small:
        return Split.undivided(train, notes)
    notes.append(
        f"{root}: left out, because there are fewer than two images: {shorten(small)}; add some"
    )
    return Split.undivided(select_classes(train, kept), notes)


def open_parts(root: Path, max_held_out: int | None = None) -> OpenedParts:
    """Open the parts of *root*: an official layout, the images in `labels.csv`, or class folders.

    Of the folders with held-out images, it opens the first *max_held_out*, by default all.
    Raises `DataError`.
    """
    if (kind := detect_kind(root)) is not None:
        train, held_out = open_part(kind, "train", root), open_part(kind, "held_out", root)
        return OpenedParts({"train": train, "test": held_out})
    if (where := find_table(root)) is None:
        return _open_class_folders(root, max_held_out)
    table = read_label_table(where)
    for name, images in table.parts.items():
        check_has_classes(where, name, images)
    train, *_ = table.parts.values()
    problems = [
        f"{where}: no training image of {train.labels[index]}; set the split of one of its images to {TRAIN}"
        for index in np.flatnonzero(train.class_counts() == 0)
    ]
    notes = [*table.notes]
    if not train.is_multi_label:
        notes.append(f"{where}: every image has one class, so the network predicts one")
    return table._replace(problems=problems, notes=notes)


def _open_class_folders(root: Path, max_held_out: int | None) -> OpenedParts:
    """Open the class folders of the parts in *root*, or those in *root* itself; raises `DataError`."""
    parts = find_parts(root)
    folders = _find_part_folders(root, parts, max_held_out)
    tables = {name: table for name, folder in folders.items() if (table := find_table(folder))}
    if tables:
        return _open_part_tables(root, folders, tables)
    listings = {name: list_classes(folder) for name, folder in folders.items()}
    train = listings[parts.train or UNSPLIT].images
    if not train.labels:
        raise no_classes(root, train.root)
    other_table = _find_other_table(root, listings.values())
    if len(train.labels) == 1:
        raise DataError(
            f"{train.root}: holds only one class ({train.labels[0]}); a classifier needs at least two"
            + (_suggest_folder(train) or (other_table and f"; {other_table}"))
        )
    notes = [*_describe_parts(root, parts)]
    if outputs := list_outputs(root):
        notes.append(
            f"{root}: left out, because they are or hold bundles or runs: {shorten(outputs)}"
        )
    problems, other_files = list[str](), list[str]()
    for listing in listings.values():
        _check_no_parts_inside(listing)
        problems += _describe_class_problems(listing, train.labels)
        if listing.nested:
            notes.append(
                f"{listing.images.root}: images of folders in a class folder count as images of that class, "
                f"those of several folders as a group each: {shorten(listing.nested)}"
                + (
                    _suggest_folder(listing.images)
                    or "; move these folders up if they are classes"
                )
            )
        notes += [
            f"{listing.images.root}: {line}"
            for line in describe_confusable(listing.images.labels)
        ]
        for files in listing.other_files.values():
            other_files += files
    if other_table:
        notes.append(other_table)
    opened = {name: listing.images for name, listing in listings.items()}
    return OpenedParts(opened, problems, notes, count_suffixes(other_files))


def _open_part_tables(
    root: Path, folders: Mapping[str, Path], tables: Mapping[str, Path]
) -> OpenedParts:
    """Open the parts of *root*, each of whose *folders* has a table of its own; raises `DataError`."""
    parts, notes, ignored = dict[str, ImageFiles](), list[str](), Counter[str]()
    for name, folder in folders.items():
        if (table := tables.get(name)) is None:
            used = next(iter(tables.values()))
            raise DataError(
                f"{folder}: has no table as {used}; add one, or sort all parts into classes"
            )
        if table.name == LABELS_FILE:
            raise DataError(
                f"{table}: not read here; write one for all images in {root}, with a column "
                f"{SPLIT}, or rename it if the folders are the classes"
            )
        train = next(iter(parts.values()), None)
        if train is None:
            opened = read_label_table(table)
            notes.append(f"{table}: the classes are in it")
        else:
            opened = read_label_table(table, train.labels, multi_label=train.is_multi_label)
        if UNSPLIT not in opened.parts:
            raise DataError(
                f"{table}: has a column {SPLIT}, but its folder is a part; remove the column"
            )
        parts[name] = opened.parts[UNSPLIT]
        notes += opened.notes
        ignored.update(opened.ignored)
    return OpenedParts(parts, notes=notes, ignored=ignored)


def _find_other_table(root: Path, listings: Iterable["ClassListing"]) -> str:
    """Describe a table in *root*, in a part or in a class folder that lists the images; "" without one."""
    files, images = sorted(root.glob("*.*")), list[bytes]()
    for listing in listings:
        images += listing.images.paths.tolist()
        if listing.images.root != root:
            files += sorted(listing.images.root.glob("*.*"))
        for others in listing.other_files.values():
            files += [listing.images.root / file for file in others]
    return describe_other_table(root, images, files)


def _find_part_folders(root: Path, parts: Parts, max_held_out: int | None) -> dict[str, Path]:
    """Find the folder of training images, or *root*, and the first *max_held_out* of held-out ones."""
    if parts.held_out and not parts.train and not parts.others:
        raise DataError(
            f"{root}: holds {parts.held_out[0]} but no {TRAIN}; put the training images there"
        )
    if not parts.train:
        return {UNSPLIT: root}
    classes = (
        () if parts.held_out else [name for name in parts.others if holds_images(root / name)]
    )
    if classes:
        raise DataError(
            f"{root}: {parts.train} may be a class, as {shorten(classes)}, or hold the training images; "
            f"rename it if it is a class, or move the others out of this folder"
        )
    return {
        name: part_folder(root, name) for name in (parts.train, *parts.held_out[:max_held_out])
    }


def _check_no_parts_inside(listing: "ClassListing") -> None:
    """Raise `DataError` if class folders hold folders of training images, such as `cat/train`."""
    inside = [path for path in listing.nested if part_kind(path.rpartition("/")[2])]
    if any(part_kind(path.rpartition("/")[2]) in TRAINING for path in inside):
        label, _, part = inside[0].rpartition("/")
        raise DataError(
            f"{listing.images.root}: class folders hold parts of the data: {shorten(inside)}; put the "
            f"parts above the classes, such as {part}/{label}"
        )


class ClassListing(NamedTuple):
    """What class folders hold, with paths relative to the root of `images`.

    `other_files` are the files that are no images by class, `nested` the folders with images in
    class folders.
    """

    images: ImageFiles
    other_files: dict[str, list[str]]
    nested: list[str]


def list_classes(root: Path) -> ClassListing:
    """List the content of every class folder in *root*, sorted; a class may be empty.

    Folders with one name in two encodings are one class. The images of a folder in a class
    folder are a group, unless it holds all images of the class. A link to a class folder is not
    followed.
    """
    folders = defaultdict[str, list[str]](list)  # names of folders by class
    for name in list_subfolders(root):
        folders[normalize(name)].append(name)
    check_labels(root, sorted(folders))
    visited = {folder_identity(root / name) for names in folders.values() for name in names}
    paths: list[bytes] = []
    groups: list[bytes] = []
    targets: list[int] = []
    other_files: dict[str, list[str]] = {}
    nested: set[str] = set()
    for target, label in enumerate(sorted(folders)):
        class_paths: list[bytes] = []
        other_files[label] = []
        for name in folders[label]:
            images_of_folder, others = list_images(root, name, visited)
            class_paths += images_of_folder
            other_files[label] += others
        # The entry of the class folder that holds each image: the folder `cat/x` for
        # `cat/x/1.jpg` and for `cat/x/y/2.jpg`, the file itself for `cat/3.jpg`.
        entries = [b"/".join(path.split(b"/")[:2]) for path in class_paths]
        nested.update(
            map(os.fsdecode, set(entries) - set(class_paths))
        )  # the folders among the entries
        has_one_entry = (
            len(set(entries)) == 1
        )  # it says nothing: each image is then a group of its own
        groups += class_paths if has_one_entry else entries
        targets += [target] * len(class_paths)
        paths += class_paths
    no_two_together = len(set(groups)) == len(groups)
    known_groups = None if no_two_together else np.asarray(groups, dtype=np.bytes_)
    path_array, target_array = (
        np.asarray(paths, dtype=np.bytes_),
        np.asarray(targets, dtype=np.int64),
    )
    images = ImageFiles(root, tuple(sorted(folders)), path_array, target_array, known_groups)
    return ClassListing(images, other_files, sorted(nested))


def _describe_class_problems(listing: ClassListing, labels: tuple[str, ...]) -> Iterator[str]:
    """Describe classes of *listing* that are not in *labels*, labels without a folder, and empty folders."""
    images = listing.images
    root, folders = images.root, set(images.labels)
    unknown, missing = sorted(folders - set(labels)), list[str]()
    for label in sorted(set(labels) - folders):
        alike = [folder for folder in unknown if lookalike_key(folder) == lookalike_key(label)]
        if alike:
            names = " and ".join(map(repr, alike))
            yield f"{root}: the class {names} is {label!r} in the training images; rename one of them"
            unknown = [folder for folder in unknown if folder not in alike]
        else:
            missing.append(label)
    if unknown:
        yield f"{root}: classes {shorten(unknown)} are not training classes, remove them or train on them"
    if missing:
        yield f"{root}: training classes {shorten(missing)} are missing, add them"
    used = set(images.targets.tolist())
    empty = [label for index, label in enumerate(images.labels) if index not in used]
    if empty:
        more = f" (also in {shorten(empty[1:])})" if len(empty) > 1 else ""
        ignored = describe_suffixes(count_suffixes(listing.other_files[empty[0]]))
        only_others = f", only other files ({ignored})" if ignored else ""
        yield (
            f"{root / empty[0]}: no images in this class folder{more}{only_others}; "
            f"add some ({describe_formats()}) or remove the folder{_suggest_folder(images)}"
        )


def single_images(images: ImageFiles) -> Iterator[str]:
    """Describe the classes with a single image, which training leaves out."""
    for target in np.flatnonzero(images.class_counts() == 1):
        yield f"{images.root / images.labels[target]}: only one image; add another"


def no_classes(root: Path, part: Path | None = None) -> DataError:
    """Build the error for *root*, or a *part* of it, without classes; it names a table of the images."""
    images, others = list_images(root)
    other_table = describe_other_table(root, images, (root / file for file in others))
    return DataError(
        f"{root if part is None else part}: holds no class folders and no labels.csv; "
        + (other_table or "sort the images into one subfolder per class")
    )


def _suggest_folder(images: ImageFiles, advice: str = "run: sopdeploy train --data") -> str:
    """Give *advice* with the folder below the root of *images* whose subfolders may be the classes, or "".

    For `archive/images/rose/1.jpg`, it is `archive/images`. There is none if a class folder
    holds images itself, or if the subfolders of several class folders share no name: they are
    then the objects of each class.
    """
    counts = defaultdict[str, Counter[str]](
        Counter
    )  # images of each subfolder, by the path of its parent
    for path in images.paths.tolist():
        parent, _, subfolder = os.fsdecode(path).rpartition("/")[0].rpartition("/")
        counts[parent][subfolder] += 1
    if not counts or "" in counts:  # no images, or a class folder that holds some itself
        return ""
    best = max(counts, key=lambda parent: (len(counts[parent]) > 1, counts[parent].total()))
    names = counts.pop(best)
    other_names = set[str]().union(*counts.values())
    is_only_class = len(set(images.targets.tolist())) == 1
    may_be_classes = len(names) > 1 and (is_only_class or names.keys() & other_names)
    if not may_be_classes:
        return ""
    while part_kind(best.rpartition("/")[2]):  # a part of the data set
        best = best.rpartition("/")[0]
    return f"; if {shorten(sorted(names))} are the classes, {advice} {quote(str(images.root / best))}"


def _describe_parts(root: Path, parts: Parts) -> Iterator[str]:
    """Describe the folders of *root* that training ignores, and folders such as val that count as classes."""
    if parts.train:
        used = (
            parts.train,
            *parts.held_out[:1],
        )  # the first folder of held-out images, if there is one
        unused = (*parts.held_out[1:], *parts.others)
        if unused:
            yield f"{root}: training uses {' and '.join(used)} only, not {shorten(unused)}"
    elif parts.others and (
        trains := [name for name in parts.others if part_kind(name) in TRAINING]
    ):
        yield f"{root}: {shorten(trains)} counts as a class, because it holds no folders"
    elif parts.held_out and parts.others:
        yield f"{root}: {shorten(parts.held_out)} counts as a class, because there is no folder {TRAIN}"


def open_evaluation_images(
    root: Path,
    labels: tuple[str, ...],
    *,
    multi_label: bool = False,
    other_classes: bool = False,
    log: Log = lambda _line: None,
) -> ImageFiles:
    """Open the labeled images below *root* for a network with the classes *labels*, in their order.

    It opens only the held-out images if the data are split. Classes are matched by name;
    WordNet IDs match the names of ImageNet's classes. With *multi_label*, `labels.csv` lists
    several classes per image. *log* receives a line about classes without images and about the
    part that is opened. Raises `DataError` for folders that are no class of the network, unless
    *other_classes* are left out, or if there are no images.
    """
    root = check_holds_classes(root)
    if multi_label:
        folder = _held_out_folder(root, labels, log)
        if (table := find_table(root) or find_table(folder)) is None:
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts several classes per image; list the "
                "images and their classes in this file"
            )
        return _held_out_of_table(
            table, labels, multi_label=True
        )  # has exactly the classes *labels*
    kind = detect_kind(root)
    if kind is not None:
        images = open_part(kind, "held_out", root)
    else:
        folder = _held_out_folder(root, labels, log)
        if table := find_table(folder):
            images = _held_out_of_table(table, labels, multi_label=False)
        else:
            listing = list_classes(folder)
            images = listing.images
            note_skipped(
                root, count_suffixes(chain.from_iterable(listing.other_files.values()))
            )
    allow_unknown = (
        other_classes or kind is not None
    )  # the names of official classes are no mistakes
    images = _match_classes(root, images, labels, allow_unknown, log)
    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def _held_out_folder(root: Path, labels: tuple[str, ...], log: Log) -> Path:
    """Return the folder in *root* that has the held-out images, such as val/; without one, *root* itself."""
    names = {normalize(name) for name in list_subfolders(root)}
    if names <= {
        normalize(label) for label in labels
    }:  # each one is a class, even if named val
        return root
    parts = find_parts(root)
    val_is_a_class = (
        parts.others and not parts.train
    )  # as in training, which needs a train/ next to a val/
    if val_is_a_class or not parts.held_out:
        return root
    folder = part_folder(root, parts.held_out[0])
    log(f"{folder}: the images in this folder are used")
    return folder


def _held_out_of_table(
    table: Path, labels: tuple[str, ...], *, multi_label: bool
) -> ImageFiles:
    """Open the held-out images of *table*, or all if it does not divide them."""
    # The last part: `val` after `train`, or the only one.
    opened = read_label_table(table, labels, multi_label=multi_label)
    note_skipped(table.parent, opened.ignored)
    *_, (name, images) = opened.parts.items()
    check_has_classes(table, name, images)
    return images


def _match_classes(
    root: Path, images: ImageFiles, labels: tuple[str, ...], allow_unknown: bool, log: Log
) -> ImageFiles:
    """Give *images* the classes *labels*; raises `DataError` for other classes unless *allow_unknown*."""
    aliases = class_aliases()  # of WordNet IDs
    label_of_name = {normalize(label): label for label in labels}
    names = tuple(label_of_name.get(name, aliases.get(name, name)) for name in images.labels)
    unknown = [
        label for label, name in zip(images.labels, names, strict=True) if name not in labels
    ]
    are_allowed = allow_unknown and len(unknown) < len(names)  # at least one class must remain
    hint = hint_at_spelling(unknown, labels)
    if unknown and not are_allowed:
        hint = hint or _suggest_folder(images, "give")
        verb = "are not classes" if len(unknown) > 1 else "is no class"
        raise DataError(
            f"{root}: {shorten(unknown)} {verb} of the network, which knows {shorten(labels)}; remove or "
            f"rename the folders{hint}",
            lists={"unknown": unknown, "classes": labels},
        )
    if unknown:
        log(f"{root}: left out, of no class: {shorten(unknown)}{hint}")
    matched = select_classes(images.replaced(labels=names), labels)
    if not len(matched):
        raise DataError(f"{root}: holds no images of these classes; add some")
    return matched


def check_holds_classes(root: Path) -> Path:
    """Return the data folder *root*; raises `DataError` unless it has class folders, or a file with labels.

    Reads no image and needs no network. Commands call this before they import torch, which
    takes seconds.
    """
    root = data_folder(root)
    if list_subfolders(root) or find_table(root) or detect_kind(root) is not None:
        return root
    raise no_classes(root)


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
    listed, others = list_images(root)
    note_skipped(root, count_suffixes(others))
    paths = np.asarray(listed, dtype=np.bytes_)
    if not len(paths):
        raise DataError(f"{root}: holds no images; give a folder with {ANY_IMAGES}")
    return ImageFiles(root, ("",), paths, np.zeros(len(paths), dtype=np.int64))


class UnknownImages(NamedTuple):
    """The images of no class, None if none remain, and a line about those that were left out, if any."""

    images: ImageFiles | None
    note: str


def open_unknown(root: Path) -> UnknownImages:
    """Open the images of no class below *root*, without those that a server kept because of their scores.

    The live network rejected most of these, so that the share that a network rejects would seem
    higher than it is. Those of the uniform sample remain.
    """
    images = open_any_images(root)
    paths = [images.path(index) for index in range(len(images))]
    is_fair_N = np.array(
        [
            path.parent.name == SAMPLE_FOLDER or not is_kept_photograph(path.name)
            for path in paths
        ]
    )
    count = int(is_fair_N.sum())
    line = (
        f"{root}: {amount(len(paths) - count, 'photograph')} left out, because a server kept them outside of "
        f"its sample, mostly as unknown; {count:,} remain"
    )
    remaining = images.select(is_fair_N) if count else None
    return UnknownImages(remaining, "" if count == len(paths) else line)
