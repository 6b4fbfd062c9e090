"""Training images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/ (`files`).

A folder with `labels.csv`, or an export of a label tool, holds images that this table lists
with their classes (`table`), and official layouts are read by torchvision (`libraries`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from shlex import quote

import numpy as np

from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import count_suffixes, describe_skipped
from sopdeploy.photos.class_folders import (
    ClassListing,
    describe_class_problems,
    is_pattern,
    list_classes,
    no_classes_error,
)
from sopdeploy.photos.file_checks import find_unreadable
from sopdeploy.photos.files import (
    TRAIN,
    TRAINING,
    Parts,
    data_folder,
    find_parts,
    holds_images,
    list_files,
    list_outputs,
    naming_all_undecodable,
    part_folder,
    part_kind,
)
from sopdeploy.photos.libraries import detect_kind, open_part
from sopdeploy.photos.photo import ImageFiles, Split, select_classes
from sopdeploy.photos.questions import (
    ask_about_general_names,
    ask_about_held_out_classes,
    ask_about_numbered_folders,
    ask_about_parts_inside,
    ask_about_subfolders,
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


def open_folder(path: Path, classes_from: str = "") -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    *classes_from* is `FOLDERS` if each folder at the top is a class, whatever it seems to hold,
    a regular expression that finds the class in the name of a file, or "" (`list_classes`).
    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of
    class indices. Without held-out images, classes of a single image are left out.
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
            f"{root}: a classifier needs two classes of two images or more; add "
            f"images of {shorten(small)}"
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
    """Do what `open_parts` says."""
    # An official layout.
    if (kind := detect_kind(root)) is not None:
        train = open_part(kind, "train", root)
        held_out = open_part(kind, "held_out", root)
        return OpenedParts({"train": train, "test": held_out})

    # Class folders, or a table of all images.
    table = None if classes_from else find_table(root)
    if table is None:
        return _open_class_folders(root, max_held_out, classes_from)
    opened = read_label_table(table)
    for name, images in opened.parts.items():
        check_has_classes(table, name, images)
    train, *_ = opened.parts.values()
    problems = [
        f"{table}: no training image of {train.labels[index]}; set the split of "
        f"one of its images to {TRAIN}"
        for index in np.flatnonzero(train.class_counts() == 0)
    ]
    notes = [*opened.notes]
    if not train.is_multi_label:
        notes.append(f"{table}: every image has one class, so the network predicts one")
    return opened._replace(problems=problems, notes=notes)


def _open_class_folders(root: Path, max_held_out: int | None, classes_from: str) -> OpenedParts:
    """Open the classes of the parts in *root*, or those in *root* itself, as `open_parts` says.

    Raises `DataError`.
    """
    parts = find_parts(root)
    folders = _find_part_folders(root, parts)
    tables = {name: table for name, folder in folders.items() if (table := find_table(folder))}
    if tables and not classes_from:
        return _open_part_tables(root, _first_parts(folders, max_held_out), tables)

    # The training images tell the classes; if they do not, the run cannot begin.
    train_name, *held_out_names = folders
    train = list_classes(folders[train_name], classes_from)
    other_table = _find_other_table(root, parts, train)
    _check_tells_classes(root, parts, train, other_table, classes_from)

    # Held-out images need classes, but not all of them.
    labels = train.images.labels
    held_out_folders = {name: folders[name] for name in held_out_names}
    held_out, unlabelled = _list_held_out(held_out_folders, labels, max_held_out, classes_from)
    listings = {train_name: train, **held_out}

    # What is wrong with the classes, and which folders are not used.
    table_hint = _hint_at_table(root, other_table)
    problems = [
        problem
        for listing in listings.values()
        for problem in describe_class_problems(listing, labels, table_hint)
    ]
    used_to_train = [*listings][:2]  # the training part, and one that is held out
    notes = [*_describe_parts(root, parts, used_to_train, unlabelled)]

    # Held-out images get the classes of the training images, some of which they may lack.
    for name, listing in listings.items():
        if not problems and listing.images.labels != labels:
            missing = [label for label in labels if label not in listing.images.labels]
            listings[name] = listing._replace(images=select_classes(listing.images, labels))
            notes.append(
                f"{listing.images.root}: no images of {shorten(missing)}, so that "
                "the score tells nothing about them"
            )

    # What is not used is named and counted.
    if outputs := list_outputs(root):
        notes.append(
            f"{root}: left out, because they are or hold bundles or runs: {shorten(outputs)}"
        )
    for listing in listings.values():
        notes += listing.notes
    other_files = _list_other_files(root, [*listings.values()], classes_from, notes)
    if other_table:
        notes.append(describe_other_table(root, other_table))

    opened = {name: listing.images for name, listing in listings.items()}
    return OpenedParts(opened, problems, notes, count_suffixes(other_files))


def _list_other_files(
    root: Path, listings: Sequence[ClassListing], classes_from: str, notes: list[str]
) -> list[str]:
    """List the files that are no images: in the class folders of *listings*, beside them, and in *root*.

    *notes* gets a line about the images beside class folders, unless *classes_from* is a pattern,
    which finds their classes.
    """
    other_files = list[str]()
    for listing in listings:
        other_files += chain.from_iterable(listing.other_files.values())

    for folder in dict.fromkeys((root, *(listing.images.root for listing in listings))):
        beside, others = list_files(folder)
        other_files += others
        if beside and not is_pattern(classes_from):
            notes.append(
                f"{folder}: {amount(len(beside), 'image')} beside the class folders left out: "
                f"{shorten(beside)}"
            )
    return other_files


def _list_held_out(
    folders: Mapping[str, Path],
    labels: Sequence[str],
    max_held_out: int | None,
    classes_from: str,
) -> tuple[dict[str, ClassListing], dict[str, str]]:
    """List the classes of the first *max_held_out* held-out *folders* that have classes, or of all.

    *labels* are those of the training images. Returns the classes by part, and what is said of the
    folders without classes that are met on the way.
    """
    listings = dict[str, ClassListing]()
    unlabelled = dict[str, str]()
    for name, folder in folders.items():
        if len(listings) == max_held_out:
            break
        listing = list_classes(folder, classes_from)
        if _has_no_classes(listing, labels):
            unlabelled[name] = _describe_unlabelled(listing)
        else:
            listings[name] = listing
    return listings, unlabelled


def _check_tells_classes(
    root: Path,
    parts: Parts,
    train: ClassListing,
    other_table: Path | None,
    classes_from: str,
) -> None:
    """Raise `DataError` if the training images have fewer than two classes, or doubtful ones.

    With *classes_from*, no class is doubtful. *other_table* lists the images, but is not read;
    errors name it.
    """
    images = train.images
    table_hint = _hint_at_table(root, other_table)
    if not images.labels:
        raise no_classes_error(root, images.root, suggest_names(root, train.beside))

    # Two classes, unless folders are only empty, which `describe_class_problems` tells.
    filled = [images.labels[index] for index in np.flatnonzero(images.class_counts())]
    if len(filled) < 2:
        hints = (
            suggest_folder(images),
            table_hint,
            suggest_names(root, images.paths.tolist()),
        )
        hint = next(filter(None, hints), "")
        if len(images.labels) == 1:
            raise DataError(
                f"{images.root}: holds only one class ({images.labels[0]}); a "
                "classifier needs at least two" + (hint or suggest_sorting(images))
            )
        if filled and hint:
            raise DataError(
                f"{images.root}: only {filled[0]} holds images; a classifier needs "
                f"at least two classes{hint}"
            )

    # Folders that may be no classes.
    if not classes_from:
        if not parts.train:
            ask_about_held_out_classes(images, parts.held_out)
        ask_about_parts_inside(images)
        ask_about_subfolders(images)
        ask_about_general_names(images, table_hint)
        # A table without the names of the folders may have other classes.
        has_other_names = other_table and not mentions(other_table, images.labels)
        ask_about_numbered_folders(images, table_hint if has_other_names else "")


def _hint_at_table(root: Path, other_table: Path | None) -> str:
    """Continue an error with what `describe_other_table` says of *other_table*; "" without one."""
    return f"; {describe_other_table(root, other_table)}" if other_table else ""


def _first_parts(folders: Mapping[str, Path], max_held_out: int | None) -> dict[str, Path]:
    """Return the training part of *folders* and the first *max_held_out* others."""
    stop = None if max_held_out is None else max_held_out + 1
    return dict(list(folders.items())[:stop])


def _has_no_classes(listing: ClassListing, labels: Sequence[str]) -> bool:
    """Tell whether a held-out folder has no classes.

    That is if fewer than two of its folders hold images, and none of them is one of *labels*.
    """
    num_classes = int(np.count_nonzero(listing.images.class_counts()))
    return num_classes < 2 and not {*listing.images.labels} & {*labels}


def _describe_unlabelled(listing: ClassListing) -> str:
    """Say that the images of a held-out folder have no classes, and what can be done with them."""
    folder = listing.images.root
    count = len(listing.beside) + len(listing.images)
    if not count:
        return f"{folder}: left out, because it is empty"
    return (
        f"{folder}: left out, because it has none of the classes: "
        f"{amount(count, 'image')}, which `sopdeploy predict BUNDLE "
        f"{quote(str(folder))}` can classify"
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
                f"{table}: not read here; write one for all images in {root}, "
                f"with a column {SPLIT}, or rename it if the folders are the "
                "classes"
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


def _find_other_table(root: Path, parts: Parts, train: ClassListing) -> Path | None:
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
    """Find the folder of training images, or *root*, and then those of held-out ones, by part.

    Raises `DataError` if there are only held-out ones, or if the part with training images may be
    a class.
    """
    if parts.held_out and not parts.train and not parts.others:
        raise DataError(
            f"{root}: holds {parts.held_out[0]} but no {TRAIN}; put the "
            "training images there, or rename the folders if they are "
            "classes"
        )
    if not parts.train:
        return {UNSPLIT: root}

    # Without a held-out part, this folder may be a class, as others with images are.
    if not parts.held_out:
        classes = [name for name in parts.others if holds_images(root / name)]
        if classes:
            raise DataError(
                f"{root}: {parts.train} may be a class, as {shorten(classes)}, or "
                "hold the training images; rename it if it is a class, or move "
                "the others out of this folder"
            )
    return {name: part_folder(root, name) for name in (parts.train, *parts.held_out)}


def describe_single_images(images: ImageFiles) -> Iterator[str]:
    """Describe the classes with a single image, which training leaves out."""
    for target in np.flatnonzero(images.class_counts() == 1):
        yield f"{images.root / images.labels[target]}: only one image; add another"


def _describe_parts(
    root: Path, parts: Parts, used: Sequence[str], unlabelled: Mapping[str, str]
) -> Iterator[str]:
    """Describe the folders of *root* that training ignores, and a folder train that counts as a class.

    *used* are the parts that it uses; *unlabelled* has the lines about held-out parts without
    classes.
    """
    yield from unlabelled.values()
    if parts.train:
        unused = {*parts.held_out, *parts.others} - {*used, *unlabelled}
        if unused:
            yield (
                f"{root}: training uses {' and '.join(used)} only, not "
                f"{shorten(sorted(unused))}"
            )
        return

    train_classes = [name for name in parts.others if part_kind(name) in TRAINING]
    if train_classes:
        yield f"{root}: {shorten(train_classes)} counts as a class, because it holds no folders"
