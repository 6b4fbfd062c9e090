"""Images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/ (`files`).

A folder with `labels.csv`, or an export of a label tool, holds images that this table lists
with their classes (`table`), and official layouts are read by torchvision (`libraries`).

Letter: N images.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
    FOLDERS,
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
    list_files,
    list_images,
    list_outputs,
    list_subfolders,
    lookalike_key,
    naming_all_undecodable,
    normalize,
    part_folder,
    part_kind,
)
from sopdeploy.photos.forms import find_leftovers
from sopdeploy.photos.libraries import detect_kind, open_part
from sopdeploy.photos.photo import ImageFiles, Split, find_unreadable, select_classes
from sopdeploy.photos.questions import (
    ask_about_numbered_folders,
    ask_about_repeated_folders,
    class_in_name,
    sort_by_hand,
    suggest_folder,
    suggest_names,
    suggest_sorting,
)
from sopdeploy.photos.table import (
    LABELS_FILE,
    SPLIT,
    UNSPLIT,
    OpenedParts,
    check_has_classes,
    describe_other_table,
    find_other_table,
    find_table,
    mentions,
    read_label_table,
)

ANY_IMAGES = "JPEG or PNG files, with or without subfolders"


def open_folder(path: Path, classes_from: str = "") -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    *classes_from* is `FOLDERS` if each folder at the top is a class, whatever it seems to hold,
    a regular expression that finds the class in the name of a file, or "" (`list_classes`).
    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of
    class indices. Without a folder of held-out images, classes of a single image are left out.
    Raises `DataError`.
    """
    root = data_folder(path)
    opened = open_parts(root, max_held_out=1, classes_from=classes_from)
    notes = [*opened.notes]
    if opened.ignored:
        notes.append(f"{root}: {describe_skipped(opened.ignored)}")

    # Other problems end the run; unreadable images are named with them, though training would
    # leave some out.
    if opened.problems:
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


def open_parts(
    root: Path, max_held_out: int | None = None, classes_from: str = ""
) -> OpenedParts:
    """Open the parts of *root*: an official layout, the images in `labels.csv`, or class folders.

    Of the folders with held-out images, it opens the first *max_held_out* that have classes, by
    default all. With *classes_from*, `list_classes` reads the classes. Raises `DataError`.
    """
    with naming_all_undecodable(root):
        return _open_parts(root, max_held_out, classes_from)


def _open_parts(root: Path, max_held_out: int | None, classes_from: str) -> OpenedParts:
    # An official layout.
    if (kind := detect_kind(root)) is not None:
        train = open_part(kind, "train", root)
        held_out = open_part(kind, "held_out", root)
        return OpenedParts({"train": train, "test": held_out})

    # Class folders, or a table of all images.
    where = None if classes_from else find_table(root)
    if where is None:
        return _open_class_folders(root, max_held_out, classes_from)
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


def _open_class_folders(root: Path, max_held_out: int | None, classes_from: str) -> OpenedParts:
    """Open the classes of the parts in *root*, or those in *root* itself; raises `DataError`."""
    parts = find_parts(root)
    folders = _find_part_folders(root, parts)
    tables = {name: table for name, folder in folders.items() if (table := find_table(folder))}
    if tables and not classes_from:
        return _open_part_tables(root, _first_parts(folders, max_held_out), tables)

    # The training images tell the classes, or nothing does.
    train_name, *held_out_names = folders
    train = list_classes(folders[train_name], classes_from)
    other_table = _find_other_table(root, parts, train)
    _check_tells_classes(root, train, other_table, classes_from)

    # Held-out images need classes, but not all of them.
    listings = {train_name: train}
    unlabelled = dict[str, str]()
    labels = train.images.labels
    for name in held_out_names:
        if len(listings) - 1 == max_held_out:
            break
        listing = list_classes(folders[name], classes_from)
        if _has_no_classes(listing, labels):
            unlabelled[name] = _describe_unlabelled(listing)
        else:
            listings[name] = listing
    problems = [
        problem
        for listing in listings.values()
        for problem in _describe_class_problems(listing, labels)
    ]
    notes = [*_describe_parts(root, parts, [*listings][:2], unlabelled)]
    for name, listing in listings.items():
        if not problems and listing.images.labels != labels:
            missing = [label for label in labels if label not in listing.images.labels]
            listings[name] = listing._replace(images=select_classes(listing.images, labels))
            notes.append(
                f"{listing.images.root}: no images of {shorten(missing)}, so that the score tells nothing about them"
            )

    # What is not used is named and counted.
    if outputs := list_outputs(root):
        notes.append(
            f"{root}: left out, because they are or hold bundles or runs: {shorten(outputs)}"
        )
    other_files = list[str]()
    for listing in listings.values():
        _check_no_parts_inside(listing)
        notes += listing.notes
        other_files += chain.from_iterable(listing.other_files.values())
    for folder in dict.fromkeys((root, *(one.images.root for one in listings.values()))):
        beside, others = list_files(folder)
        other_files += others
        if beside and not is_pattern(classes_from):
            count = amount(len(beside), "image")
            notes.append(
                f"{folder}: {count} beside the class folders left out: {shorten(beside)}"
            )
    if other_table:
        notes.append(describe_other_table(root, other_table))
    opened = {name: listing.images for name, listing in listings.items()}
    return OpenedParts(opened, problems, notes, count_suffixes(other_files))


def _check_tells_classes(
    root: Path, train: "ClassListing", other_table: Path | None, classes_from: str
) -> None:
    """Raise `DataError` if the training images have fewer than two classes, or doubtful ones."""
    images = train.images
    listing = f"; {describe_other_table(root, other_table)}" if other_table else ""
    if not images.labels:
        raise no_classes(root, images.root, suggest_names(root, train.beside))
    filled = [images.labels[index] for index in np.flatnonzero(images.class_counts())]
    if len(filled) < 2:
        hints = (
            suggest_folder(images),
            listing,
            suggest_names(root, images.paths.tolist()),
        )
        hint = next(filter(None, hints), "")
        if len(images.labels) == 1:
            raise DataError(
                f"{images.root}: holds only one class ({images.labels[0]}); a classifier needs at least two"
                + (hint or suggest_sorting(images))
            )
        if filled and hint:
            raise DataError(
                f"{images.root}: only {filled[0]} holds images; a classifier needs at least two classes{hint}"
            )
    _check_no_parts_inside(train)
    if not classes_from:
        ask_about_repeated_folders(images)
        is_listed = other_table and not mentions(other_table, images.labels)
        ask_about_numbered_folders(images, listing if is_listed else "")


def _first_parts(folders: Mapping[str, Path], max_held_out: int | None) -> dict[str, Path]:
    """Return the training part of *folders* and the first *max_held_out* others."""
    stop = None if max_held_out is None else max_held_out + 1
    return dict(list(folders.items())[:stop])


def _has_no_classes(listing: "ClassListing", labels: Sequence[str]) -> bool:
    """Tell whether a held-out folder has no classes.

    That is if fewer than two of its folders hold images, and none of them is one of *labels*.
    """
    num_classes = int(np.count_nonzero(listing.images.class_counts()))
    return num_classes < 2 and not {*listing.images.labels} & {*labels}


def _describe_unlabelled(listing: "ClassListing") -> str:
    """Say that the images of a held-out folder have no classes, and what can be done with them."""
    folder = listing.images.root
    count = len(listing.beside) + len(listing.images)
    if not count:
        return f"{folder}: left out, because it is empty"
    return (
        f"{folder}: left out, because it has none of the classes: {amount(count, 'image')}, which "
        f"`sopdeploy predict BUNDLE {quote(str(folder))}` can classify"
    )


def _open_part_tables(
    root: Path, folders: Mapping[str, Path], tables: Mapping[str, Path]
) -> OpenedParts:
    """Open the parts of *root*, by *folders*, each with a table of its own; raises `DataError`.

    *tables* are those that were found, by part.
    """
    parts = dict[str, ImageFiles]()
    notes = list[str]()
    ignored = Counter[str]()
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

        # The first table is that of the training images, and tells the classes of the others.
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


def _find_other_table(root: Path, parts: Parts, train: "ClassListing") -> Path | None:
    """Find a table that lists the training images; None without one.

    It is in *root* or another folder there, in the training part or in a class.
    """
    beside = parts.others if parts.train else ()
    folders = dict.fromkeys((root, train.images.root, *(root / name for name in beside)))
    files = [file for folder in folders for file in sorted(folder.glob("*.*"))]
    for others in train.other_files.values():
        files += [train.images.root / file for file in others]
    return find_other_table(train.images.paths.tolist(), files)


def _find_part_folders(root: Path, parts: Parts) -> dict[str, Path]:
    """Find the folder of training images, or *root*, and then those of held-out ones."""
    if parts.held_out and not parts.train and not parts.others:
        raise DataError(
            f"{root}: holds {parts.held_out[0]} but no {TRAIN}; put the training images there, or rename the "
            "folders if they are classes"
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
    return {name: part_folder(root, name) for name in (parts.train, *parts.held_out)}


def _check_no_parts_inside(listing: "ClassListing") -> None:
    """Raise `DataError` if class folders hold folders of training images, such as `cat/train`."""
    inside = [path for path in listing.nested if part_kind(path.rpartition("/")[2])]
    if np.count_nonzero(listing.images.class_counts()) > 1 and any(
        part_kind(path.rpartition("/")[2]) in TRAINING for path in inside
    ):
        label, _, part = inside[0].rpartition("/")
        advice = suggest_folder(listing.images) or (
            f"; put the parts above the classes, such as {part}/{label}"
        )
        raise DataError(
            f"{listing.images.root}: class folders hold parts of the data: {shorten(inside)}{advice}"
        )


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
    folder are a group, unless it holds all images of the class. A link to a class folder is not
    followed. Masks, photographs in another form (`find_leftovers`), and classes that hold nothing
    else are left out, unless *classes_from* is `FOLDERS`. If *classes_from* is a regular
    expression, it finds the class in the name of each image below *root*, whatever its folder.
    """
    paths_of_folder, other_files = _list_folders(root)
    beside, _ = list_files(root)
    notes = list[str]()

    # Images that are no photographs of their own are left out.
    if classes_from != FOLDERS:
        for leftover in find_leftovers(root, paths_of_folder):
            remaining = {
                label: [path for path in paths if path not in leftover.paths]
                for label, paths in paths_of_folder.items()
            }
            paths_of_folder = {
                label: paths
                for label, paths in remaining.items()
                if paths or not paths_of_folder[label]
            }
            where = sorted({str(Path(os.fsdecode(path)).parent) for path in leftover.paths})
            notes.append(
                f"{root}: left out, because they are {leftover.content}: "
                f"{amount(len(leftover.paths), 'image')} in {shorten(where)}"
            )

    # With a pattern, the names of files tell the classes, not the folders.
    if is_pattern(classes_from):
        paths = [*map(os.fsencode, beside), *chain.from_iterable(paths_of_folder.values())]
        return _list_by_name(root, sorted(paths), other_files, classes_from, notes)

    # A class folder's entry that holds each image: the folder `cat/x` for `cat/x/1.jpg` and for
    # `cat/x/y/2.jpg`, the file itself for `cat/3.jpg`.
    labels = tuple(sorted(paths_of_folder))
    paths = list[bytes]()
    groups = list[bytes]()
    targets = list[int]()
    nested = set[bytes]()
    for target, label in enumerate(labels):
        class_paths = paths_of_folder[label]
        entries = [b"/".join(path.split(b"/")[:2]) for path in class_paths]
        if len({*entries}) > 1:
            nested |= {*entries} - {*class_paths}
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
            f"{root}: images of folders in a class folder count as images of that class, those of several "
            f"folders as a group each: {shorten(nested_folders)}"
            + (suggest_folder(images) or "; move these folders up if they are classes")
        )
    notes += [f"{root}: {line}" for line in describe_confusable(labels)]
    return ClassListing(images, other_files, nested_folders, [*map(os.fsencode, beside)], notes)


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
        images[label], other_files[label] = [], []
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
    """Sort the images *paths* in *root* by the classes that *pattern* finds in their names."""
    found = [class_in_name(path, pattern) for path in paths]
    labels = tuple(sorted(filter(None, set(found))))
    check_labels(root, labels)
    without = [path for path, label in zip(paths, found, strict=True) if not label]
    if without and labels:
        names = shorten([*map(os.fsdecode, without)])
        notes.append(
            f"{root}: {amount(len(without), 'image')} left out, in whose names {pattern!r} finds no class: {names}"
        )
    kept = [path for path, label in zip(paths, found, strict=True) if label]
    targets = [labels.index(label) for label in found if label]
    images = ImageFiles(
        root, labels, np.asarray(kept, np.bytes_), np.asarray(targets, np.int64)
    )
    notes += [f"{root}: {line}" for line in describe_confusable(labels)]
    return ClassListing(images, other_files, [], without, notes)


def is_pattern(classes_from: str) -> bool:
    """Tell whether *classes_from* is a regular expression for the names of files."""
    return classes_from not in ("", FOLDERS)


def _describe_class_problems(listing: ClassListing, labels: tuple[str, ...]) -> Iterator[str]:
    """Describe classes of *listing* that are not in *labels*, labels without a folder, and empty folders."""
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
            yield f"{root}: the class {names} is {label!r} in the training images; rename one of them"
            unknown = [folder for folder in unknown if folder not in alike]
        else:
            missing.append(label)

    # Other unknown classes, and missing ones.
    if unknown:
        yield f"{root}: classes {shorten(unknown)} are not training classes, remove them or train on them"
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
            + (suggest_folder(images) or suggest_sorting(images))
        )


def single_images(images: ImageFiles) -> Iterator[str]:
    """Describe the classes with a single image, which training leaves out."""
    for target in np.flatnonzero(images.class_counts() == 1):
        yield f"{images.root / images.labels[target]}: only one image; add another"


def no_classes(root: Path, part: Path | None = None, hint: str = "") -> DataError:
    """Build the error for *root*, or a *part* of it, without classes.

    It names a table that lists the images, or else ends in the *hint*, or in how to sort them.
    """
    images, others = list_images(root)
    table = find_other_table(images, (root / file for file in others))
    other_table = "" if table is None else describe_other_table(root, table)
    unsorted = root if part is None else part
    by_hand = sort_by_hand(unsorted) if images else ""
    return DataError(
        f"{unsorted}: holds no class folders and no labels.csv; "
        + (other_table or f"sort the images into one subfolder per class{hint or by_hand}")
    )


def _describe_parts(
    root: Path, parts: Parts, used: Sequence[str], unlabelled: Mapping[str, str]
) -> Iterator[str]:
    """Describe the folders of *root* that training ignores, and folders such as val that count as classes."""
    yield from unlabelled.values()
    if parts.train:
        unused = {*parts.held_out, *parts.others} - {*used, *unlabelled}
        if unused:
            yield f"{root}: training uses {' and '.join(used)} only, not {shorten(sorted(unused))}"
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
    with naming_all_undecodable(root):
        return _open_evaluation_images(
            check_holds_classes(root), labels, multi_label, other_classes, log
        )


def _open_evaluation_images(
    root: Path, labels: tuple[str, ...], multi_label: bool, other_classes: bool, log: Log
) -> ImageFiles:
    if multi_label:
        folder = _held_out_folder(root, labels, log)
        if (table := find_table(root) or find_table(folder)) is None:
            raise DataError(
                f"{root}: has no {LABELS_FILE}, but the network predicts several classes per image; list the "
                "images and their classes in this file"
            )
        # With *labels*, the images of the table have exactly these classes.
        return _held_out_of_table(table, labels, multi_label=True)

    # One class per image: the official layout of a public data set, a table, or class folders.
    layout = detect_kind(root)  # None for a folder of the user
    if layout is not None:
        images = open_part(layout, "held_out", root)
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

    # Other classes of an official layout are no mistakes of the user.
    allow_unknown = other_classes or layout is not None
    images = _match_classes(root, images, labels, allow_unknown, log)
    empty = [labels[index] for index in np.flatnonzero(images.class_counts() == 0)]
    if empty:
        log(f"{root}: no images of {len(empty)} of {len(labels)} classes: {shorten(empty)}")
    return images


def _held_out_folder(root: Path, labels: tuple[str, ...], log: Log) -> Path:
    """Return the folder in *root* that has the held-out images, such as val/; without one, *root* itself."""
    names = {normalize(name) for name in list_subfolders(root)}
    # If each subfolder is a class, none is a part, even if it is named val.
    if names <= {normalize(label) for label in labels}:
        return root
    parts = find_parts(root)
    # As in training, val/ is a class if it is beside other folders and there is no train/.
    val_is_a_class = parts.others and not parts.train
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
        hint = hint or suggest_folder(images, "give")
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
    higher than it is. Those of the uniform sample remain.
    """
    images = open_any_images(root)
    paths = [images.path(index) for index in range(len(images))]

    # A kept photograph has an ID as its name. Those in `SAMPLE_FOLDER` were drawn whatever their
    # scores.
    is_unbiased_N = np.array(
        [
            path.parent.name == SAMPLE_FOLDER or not is_kept_photograph(path.name)
            for path in paths
        ]
    )
    num_remaining = int(is_unbiased_N.sum())
    num_left_out = len(images) - num_remaining
    if not num_left_out:
        return UnknownImages(images, "")

    note = (
        f"{root}: {amount(num_left_out, 'photograph')} left out, because a server kept them outside of "
        f"its sample, mostly as unknown; {num_remaining:,} remain"
    )
    return UnknownImages(images.select(is_unbiased_N) if num_remaining else None, note)
