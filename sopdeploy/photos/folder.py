"""Training images with one folder per class: `DIR/<class>/*.jpg`, or the same under train/ and val/ (`files`).

A folder with `labels.csv`, or an export of a label tool, holds images that this table lists
with their classes (`table`), and official layouts are read by torchvision (`libraries`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from shlex import quote

import numpy as np

from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import count_suffixes, describe_skipped
from sopdeploy.photos.cells import SPLIT
from sopdeploy.photos.class_folders import (
    ClassListing,
    advise_on_files,
    describe_class_problems,
    find_packed,
    is_pattern,
    list_classes,
    no_classes_error,
    suggest_sorting_by_hand,
)
from sopdeploy.photos.file_checks import find_unreadable
from sopdeploy.photos.files import (
    FILES,
    FOLDERS,
    LABELS_FILE,
    TRAIN,
    TRAINING,
    Parts,
    data_folder,
    find_parts,
    list_files,
    list_images,
    list_outputs,
    list_subfolders,
    naming_all_undecodable,
    part_folder,
    part_kind,
    split_names,
)
from sopdeploy.photos.forms import find_copied_folders
from sopdeploy.photos.kept import check_is_labelled, decides
from sopdeploy.photos.libraries import detect_kind, open_part
from sopdeploy.photos.photo import ImageFiles, Split, select_classes
from sopdeploy.photos.readings import Reading, choose, propose_readings
from sopdeploy.photos.table import UNSPLIT, OpenedParts, check_has_classes, read_label_table
from sopdeploy.photos.table_search import find_table, named_table
from sopdeploy.photos.tree import Tree
from sopdeploy.project import FolderReading, leads_out, table_folder


def open_folder(path: Path, classes_from: str = "", leave_out: str = "") -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    *classes_from* is `FOLDERS` if each folder at the top is a class, whatever it seems to hold,
    `SUBFOLDERS` if each innermost one is, `FILES` if a file beside each image has its class, the
    path of a table, `TABLE:COLUMN` for an unusual heading, or a regular expression that finds the
    class in the name of a file (`list_classes`). With "", the `readings` of the folder decide.
    *leave_out* are folders at the top that are not read, separated by commas.
    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of
    class indices. Photos that decide in `compare` are left out (`kept.decides`). Without held-out
    images, classes of a single image are left out. Raises `DataError`, also for the folder in which a
    server keeps photos, unless *classes_from* says where their labels are.
    """
    root = data_folder(path)
    if not classes_from:
        check_is_labelled(root)
    opened = open_parts(root, max_held_out=1, classes_from=classes_from, leave_out=leave_out)
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
    train = _leave_out_deciding(root, train, notes)
    if held_out:
        return Split(
            train=train,
            held_out=held_out[0],
            notes=tuple(notes),
            reading=opened.reading,
        )

    # Of a class of one image, none could be held out.
    counts = train.class_counts().tolist()
    kept = tuple(label for label, count in zip(train.labels, counts, strict=True) if count > 1)
    small = [label for label in train.labels if label not in kept]
    if len(kept) < 2:
        raise DataError(
            f"{root}: a classifier needs two classes of two images or more; add "
            f"images of {shorten(small)}"
        )
    if small:
        train = select_classes(train, kept)
        notes.append(
            f"{root}: left out, because there are fewer than two images: {shorten(small)}; "
            "add some"
        )
    return replace(Split.undivided(train, notes), reading=opened.reading)


def _leave_out_deciding(root: Path, train: ImageFiles, notes: list[str]) -> ImageFiles:
    """Leave the photos that decide in `compare` out of *train*; *notes* gets a line with their number."""
    names = [Path(train.identity(index)).name for index in range(len(train))]
    decides_N = np.asarray([decides(name) for name in names], np.bool_)
    if not decides_N.any():
        return train

    count = amount(int(decides_N.sum()), "photo")
    notes.append(
        f"{root}: {count} of a server's sample left out, because they decide in `compare`"
    )
    return train.select(~decides_N)


def open_parts(
    root: Path,
    max_held_out: int | None = None,
    classes_from: str = "",
    leave_out: str = "",
) -> OpenedParts:
    """Open the parts of *root*: an official layout, the images in `labels.csv`, or class folders.

    Of the folders with held-out images, it opens the first *max_held_out* that have classes, by
    default all. *classes_from* and *leave_out* are those of `open_folder`. Raises `DataError`.
    """
    with naming_all_undecodable(root):
        return _open_parts(root, max_held_out, classes_from, split_names(leave_out, root))


def _open_parts(
    root: Path, max_held_out: int | None, classes_from: str, leave_out: tuple[str, ...]
) -> OpenedParts:
    """Do what `open_parts` says."""
    # An official layout.
    if (kind := detect_kind(root)) is not None:
        train = open_part(kind, "train", root)
        held_out = open_part(kind, "held_out", root)
        return OpenedParts({"train": train, "test": held_out})

    # What the user says, or a table that nothing contradicts.
    if classes_from:
        return _open_as_said(root, max_held_out, classes_from, leave_out)
    if table := find_table(root):
        return _open_table(root, table)

    # Folders that only hold copies are left out, and the others read in the only way that there is.
    missing = [name for name in leave_out if not (root / name).is_dir()]
    if missing:
        raise DataError(f"{root}: has no folder {shorten(missing)}, which is to be left out")
    copies = find_copied_folders(root, leave_out)
    opened = _open_unasked(root, max_held_out, (*leave_out, *copies))
    if copies:
        note = f"{root}: left out, because they hold copies of the others: {shorten(copies)}"
        opened = opened._replace(notes=[*opened.notes, note])
    return opened


def _open_as_said(
    root: Path, max_held_out: int | None, classes_from: str, leave_out: tuple[str, ...]
) -> OpenedParts:
    """Open the parts of *root* with the classes that *classes_from* tells, as `open_parts` says."""
    if named := named_table(root, classes_from):
        opened = _open_table(root, *named)
    elif classes_from == FILES:
        raise no_classes_error(root)
    else:
        opened = _open_class_folders(root, max_held_out, classes_from, leave_out)

    # A table outside of the folder is the user's own choice, which no bundle repeats.
    recorded = "" if leads_out(table_folder(classes_from)) else classes_from
    reading = FolderReading(classes_from=recorded, leave_out=",".join(leave_out))
    return opened._replace(reading=reading)


def _open_unasked(
    root: Path, max_held_out: int | None, leave_out: tuple[str, ...]
) -> OpenedParts:
    """Open *root* in the only way in which its names suggest to read it, as `choose` does."""
    parts = find_parts(root, leave_out)
    num_part_classes = 0
    if parts.train:
        num_part_classes = len(list_subfolders(part_folder(root, parts.train)))
        if find_table(part_folder(root, parts.train)):
            num_part_classes = 2
    tree = Tree(root, leave_out)
    proposed = propose_readings(tree, parts, num_part_classes)

    def open_reading(reading: Reading, *, is_chosen: bool) -> OpenedParts:
        """Open *reading* as its command does or, if it is chosen unasked, without what is no photograph."""
        if reading.path != root:
            opened = _open_parts(reading.path, max_held_out, "", ())
            folder = (reading.path.relative_to(root) / opened.reading.folder).as_posix()
            inner = opened.reading.model_copy(update={"folder": folder})
            return opened._replace(reading=inner)

        names = tuple(dict.fromkeys((*leave_out, *split_names(reading.leave_out, root))))
        if reading.classes_from not in ("", FOLDERS):
            return _open_parts(root, max_held_out, reading.classes_from, names)

        kind = "" if is_chosen else reading.classes_from
        opened = _open_class_folders(root, max_held_out, kind, names)
        told = [
            f"{root}: {shorten(numbered)} are read as classes, although only their "
            "numbers differ; sort the images if these are parts of one class, such as days"
            for numbered in (tree.numbered if is_chosen else ())
        ]
        notes = [*opened.notes, *told]
        recorded = FolderReading(leave_out=",".join(names))
        return opened._replace(notes=notes, reading=recorded)

    return choose(tree, proposed, open_reading)


def _open_table(root: Path, table: Path, column: str = "") -> OpenedParts:
    """Open the images in *root* that *table* lists with their classes, as `read_label_table` does."""
    opened = read_label_table(table, root=root, column=column)
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


def _open_class_folders(
    root: Path, max_held_out: int | None, classes_from: str, leave_out: tuple[str, ...]
) -> OpenedParts:
    """Open the classes of the parts in *root*, or those in *root* itself, as `open_parts` says.

    Raises `DataError`.
    """
    parts = find_parts(root, leave_out)
    folders = _find_part_folders(root, parts, classes_from)
    tables = {name: table for name, folder in folders.items() if (table := find_table(folder))}
    if tables and not classes_from:
        # The training part, and the first ones of the others.
        stop = None if max_held_out is None else max_held_out + 1
        return _open_part_tables(root, dict([*folders.items()][:stop]), tables)

    # The training images tell the classes; if they do not, the run cannot begin.
    train_name, *held_out_names = folders
    train = list_classes(folders[train_name], classes_from, leave_out)
    _check_tells_classes(root, train)

    # Held-out images need classes, but not all of them.
    labels = train.images.labels
    held_out_folders = {name: folders[name] for name in held_out_names}
    held_out, unlabelled = _list_held_out(held_out_folders, labels, max_held_out, classes_from)
    listings = {train_name: train, **held_out}

    # What is wrong with the classes, and which folders are not used.
    problems = _describe_problems(root, folders, listings, classes_from)
    used_to_train = [*listings][:2]  # the training part, and one that is held out
    notes = [*_describe_parts(root, parts, used_to_train, unlabelled)]

    if not problems:
        listings = {
            name: _with_classes(listing, labels, notes) for name, listing in listings.items()
        }

    # What is not used is named and counted.
    if outputs := list_outputs(root):
        notes.append(
            f"{root}: left out, because they are or hold bundles or runs: {shorten(outputs)}"
        )
    for listing in listings.values():
        notes += listing.notes
    other_files = _list_other_files(root, [*listings.values()], classes_from, notes)

    opened = {name: listing.images for name, listing in listings.items()}
    return OpenedParts(opened, problems, notes, count_suffixes(other_files))


def _describe_problems(
    root: Path,
    folders: Mapping[str, Path],
    listings: Mapping[str, ClassListing],
    classes_from: str,
) -> list[str]:
    """Say what is wrong with the classes of *listings*, the parts of *root* that are used.

    The first one is the training part, which tells the classes. If only the held-out parts are wrong,
    another one of *folders* may be right.
    """
    train, *held_out = listings.values()
    labels = train.images.labels
    problems = [
        problem
        for listing in listings.values()
        for problem in describe_class_problems(listing, labels)
    ]
    if not problems or not held_out or [*describe_class_problems(train, labels)]:
        return problems

    right = [
        name
        for name, folder in folders.items()
        if name not in listings and list_classes(folder, classes_from).images.labels == labels
    ]
    if right:
        wrong = [*listings][1:]
        reading = Reading(root, f"without {shorten(wrong)}", leave_out=",".join(wrong))
        problems.append(f"{root}: {right[0]} has these classes: {reading.command}")
    return problems


def _with_classes(
    listing: ClassListing, labels: tuple[str, ...], notes: list[str]
) -> ClassListing:
    """Give the images of *listing* the *labels* of the training images; a note names classes without images."""
    if listing.images.labels == labels:
        return listing

    missing = [label for label in labels if label not in listing.images.labels]
    notes.append(
        f"{listing.images.root}: no images of {shorten(missing)}, so that "
        "the score tells nothing about them"
    )
    return listing._replace(images=select_classes(listing.images, labels))


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
        # Fewer than two of its folders hold images, and none is a class of the training images.
        num_classes = int(np.count_nonzero(listing.images.class_counts()))
        if num_classes < 2 and not {*listing.images.labels} & {*labels}:
            unlabelled[name] = _describe_unlabelled(listing)
        else:
            listings[name] = listing
    return listings, unlabelled


def _check_tells_classes(root: Path, train: ClassListing) -> None:
    """Raise `DataError` if there are no training images, or they have fewer than two classes.

    Empty folders beside others count, because `describe_class_problems` tells them.
    """
    images = train.images
    if not len(images):
        raise no_classes_error(root, images.root)
    if len(images.labels) > 1:
        return

    # A table may not have been fetched, or the images not be unpacked.
    advice = advise_on_files(root, find_packed(root, *list_images(root)))
    if advice:
        raise DataError(f"{images.root}: holds only one class ({images.labels[0]}); {advice}")

    folders = {images.path(index).parent for index in range(len(images))}
    by_hand = suggest_sorting_by_hand(folders.pop()) if len(folders) == 1 else ""
    raise DataError(
        f"{images.root}: holds only one class ({images.labels[0]}); a classifier needs at least "
        f"two. If {images.labels[0]} holds the images of all classes, sort them into one subfolder "
        f"per class{by_hand}"
    )


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


def _find_part_folders(root: Path, parts: Parts, classes_from: str) -> dict[str, Path]:
    """Find the folder of training images, or *root*, and then those of held-out ones, by part.

    With `FOLDERS` as *classes_from*, it is *root*. Raises `DataError` if there are only held-out
    ones.
    """
    if parts.held_out and not parts.train and not parts.others:
        raise DataError(
            f"{root}: holds {parts.held_out[0]} but no {TRAIN}; put the "
            "training images there, or rename the folders if they are "
            "classes"
        )
    if not parts.train or classes_from == FOLDERS:
        return {UNSPLIT: root}
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
