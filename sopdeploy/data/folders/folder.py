"""Training images of a folder: class folders, also in parts, a table, or an official layout.

What the folder is says `layout`. If this is not certain, the user is asked (`questions`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np

from sopdeploy.base.config import shown
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.base.project import FolderReading, leads_out, table_folder
from sopdeploy.data.folders.causes import no_classes_error
from sopdeploy.data.folders.cells import is_table
from sopdeploy.data.folders.class_folders import (
    ClassListing,
    describe_class_problems,
    describe_empty_classes,
    is_pattern,
    list_classes,
)
from sopdeploy.data.folders.layout import Layout, find_layout, named_table
from sopdeploy.data.folders.libraries import open_part
from sopdeploy.data.folders.questions import Reading, ask
from sopdeploy.data.folders.table import (
    UNSPLIT,
    OpenedParts,
    check_has_classes,
    read_label_table,
)
from sopdeploy.data.folders.table_search import list_tables
from sopdeploy.data.photos.contents import Contents, list_contents
from sopdeploy.data.photos.file_checks import find_unreadable
from sopdeploy.data.photos.files import data_folder, naming_all_undecodable
from sopdeploy.data.photos.outputs import list_outputs
from sopdeploy.data.photos.parts import FOLDERS, PATHS, SUBFOLDERS, TRAIN, split_names
from sopdeploy.data.photos.photo import ImageFiles, LabeledImages, Split, select_classes
from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import count_suffixes, describe_skipped


def open_folder(path: Path, classes_from: str = "", leave_out: str = "") -> Split:
    """Open the training and held-out images of a folder, with classes sorted by name.

    *classes_from* is `FOLDERS` if each folder at the top is a class, whatever it seems to hold,
    `SUBFOLDERS` if each innermost one is, the path of a table, `TABLE:COLUMN` for an unusual
    heading, or a regular expression that finds the class in the name of a file (`list_classes`).
    With "", what is not certain is asked about. *leave_out* are names of folders and files that
    are not read, also with `*`, separated by commas.
    If `labels.csv` lists images with no class or several ones, targets are (N, C) instead of
    class indices. Without held-out images, classes of a single image are left out. Raises `DataError`,
    also for the folder in which a server keeps photos, unless *classes_from* says where their labels are.
    """
    root = data_folder(path)
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
        raise DataError(
            shorten(problems, "; "),
            lists={"problems": problems, "readings": opened.commands},
        )
    train, *held_out = opened.parts.values()
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


def open_parts(
    root: Path,
    max_held_out: int | None = None,
    classes_from: str = "",
    leave_out: str = "",
) -> OpenedParts:
    """Open the parts of *root*, as `find_layout` finds them.

    Of the folders with held-out images, it opens the first *max_held_out* that have classes, by
    default all. *classes_from* and *leave_out* are those of `open_folder`. Raises `DataError`, and
    `QuestionError` if it is not certain what the classes are.
    """
    with naming_all_undecodable(root):
        names = split_names(leave_out, root)
        layout = find_layout(root, classes_from, names)
        if missing := layout.contents.missing:
            raise DataError(
                f"{root}: has nothing called {shorten(missing)}, which is to be left out"
            )
        if layout.doubts:
            question = ask(
                layout.contents, layout.parts, dict(layout.doubts), leave_out, _open_training
            )
            raise question or no_classes_error(list_contents(root, names))
        opened = _open_layout(layout, max_held_out, names)

    # A table outside of the folder is the user's own choice, which no bundle repeats.
    recorded = "" if leads_out(table_folder(classes_from)) else classes_from
    reading = FolderReading(classes_from=recorded, leave_out=",".join(names))
    return opened._replace(reading=reading)


def _open_training(reading: Reading) -> LabeledImages:
    """Open the training images of *reading*; raises `DataError`."""
    return open_folder(reading.path, reading.classes_from, reading.leave_out).train


def _open_layout(
    layout: Layout, max_held_out: int | None, leave_out: Sequence[str]
) -> OpenedParts:
    root = layout.contents.root
    if layout.kind == "official":
        train = open_part(layout.official, "train", root)
        return OpenedParts(
            {"train": train, "test": open_part(layout.official, "held_out", root)}
        )
    if layout.kind == "table":
        return _open_table(root, layout)
    if layout.kind == "part tables":
        return _open_part_tables(layout, max_held_out)
    return _open_class_folders(layout, max_held_out, leave_out)


def _open_table(root: Path, layout: Layout) -> OpenedParts:
    """Open the images in *root* that a table lists with their classes, as `read_label_table` does."""
    table = layout.table
    opened = read_label_table(table, root=root, column=layout.column)
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


def _open_part_tables(layout: Layout, max_held_out: int | None) -> OpenedParts:
    """Open the parts, each with its own table; raises `DataError` if one has none."""
    root = layout.contents.root
    name_of_table = f"{layout.table}:{layout.column}".rstrip(":")
    parts = dict[str, ImageFiles]()
    ignored = dict[str, int]()
    notes = [*_describe_unused(root, [*layout.parts], layout.unused)]
    stop = None if max_held_out is None else max_held_out + 1
    for name, part in [*layout.parts.items()][:stop]:
        named = named_table(part.root, name_of_table)
        if named is None:
            raise DataError(
                f"{part.root}: has no {layout.table}, but another part of the data has its classes "
                "in this file; add the file"
            )
        train = next(iter(parts.values()), None)
        opened = read_label_table(
            named[0],
            None if train is None else train.labels,
            multi_label=None if train is None else train.is_multi_label,
            column=named[1],
        )
        if UNSPLIT not in opened.parts:
            raise DataError(
                f"{named[0]}: has a column split, but its folder is a part; remove the column"
            )
        parts[name] = opened.parts[UNSPLIT]
        notes += opened.notes
        ignored.update(opened.ignored)
    return OpenedParts(parts, notes=notes, ignored=ignored)


def _open_class_folders(
    layout: Layout, max_held_out: int | None, leave_out: Sequence[str]
) -> OpenedParts:
    """Open the classes of the parts, as `open_parts` says."""
    root = layout.contents.root
    (train_name, training), *others = layout.parts.items()
    train = list_classes(training, layout.classes_from)
    labels = train.images.labels
    if not labels and is_pattern(layout.classes_from):
        ways = [FOLDERS, SUBFOLDERS, PATHS, *filter(is_table, layout.contents.files)]
        hint = did_you_mean(layout.classes_from, ways, f"give {', '.join(ways)} or another one")
        raise DataError(
            f"{root}: data.classes_from={shown(layout.classes_from)} is a regular expression that finds nothing "
            f"in the names of the images; {hint}"
        )
    if len(labels) < 2:
        raise no_classes_error(
            training if labels or not layout.classes_from else layout.contents
        )

    # Held-out parts that have classes, perhaps not all of them
    listings = {train_name: train}
    notes = list[str]()
    unused = [*layout.unused]
    for name, part in others:
        listing = list_classes(part, layout.classes_from)
        if not _has_classes(listing, labels):
            notes.append(_describe_unlabelled(part))
        elif len(listings) - 1 == max_held_out:
            unused.append(name)
        else:
            listings[name] = listing
    notes += _describe_unused(root, [*listings], unused)

    # What is wrong: classes that are not trained, and folders of other files
    problems = list[str]()
    wrong = [name for name, one in listings.items() if not {*one.images.labels} <= {*labels}]
    for listing in listings.values():
        problems += describe_class_problems(listing, labels)
        problems += describe_empty_classes(listing.images.root, listing)
    commands = list[str]()
    if wrong:
        without = Reading(root, layout.classes_from, ",".join([*leave_out, *wrong]))
        commands = [without.command]
        problems.append(f"{root}: without {shorten(wrong)}: {without.command}")
        return OpenedParts(
            {name: one.images for name, one in listings.items()},
            problems,
            notes,
            commands=commands,
        )

    parts = {name: _with_classes(one, labels, notes) for name, one in listings.items()}
    notes += _describe_left_out(layout.contents, listings)
    other_files = [file for one in listings.values() for file in one.other_files]
    return OpenedParts(parts, problems, notes, count_suffixes(other_files))


def _has_classes(listing: ClassListing, labels: Sequence[str]) -> bool:
    """Tell whether *listing*, a held-out part, has the classes *labels*, or several others."""
    found = {*listing.images.labels}
    return bool(found & {*labels}) or len(found) > 1


def _describe_unlabelled(part: Contents) -> str:
    if not part.images:
        return f"{part.root}: left out, because it is empty"
    return (
        f"{part.root}: left out, because it has none of the classes: {amount(len(part.images), 'image')}, "
        f"which `sopdeploy predict BUNDLE {quote(str(part.root))}` can classify"
    )


def _describe_unused(root: Path, used: Sequence[str], unused: Sequence[str]) -> Iterator[str]:
    if unused:
        yield (
            f"{root}: training uses {' and '.join(used)} only, not {shorten(sorted(unused))}"
        )


def _with_classes(
    listing: ClassListing, labels: tuple[str, ...], notes: list[str]
) -> ImageFiles:
    """Give the images of *listing* the *labels* of the training images; a note names those without images."""
    if missing := [label for label in labels if label not in listing.images.labels]:
        notes.append(
            f"{listing.images.root}: no images of {shorten(missing)}, so that the score tells "
            "nothing about them"
        )
    return select_classes(listing.images, labels)


def _describe_left_out(
    contents: Contents, listings: Mapping[str, ClassListing]
) -> Iterator[str]:
    """Say what is not read: images and folders without a class, tables, bundles and runs."""
    root = contents.root
    for listing in listings.values():
        yield from listing.notes
        if listing.empty:
            yield (
                f"{listing.images.root}: left out, because they hold no images: "
                f"{shorten(listing.empty)}"
            )
    if tables := [file for file in contents.files if is_table(file)]:
        of_images = next(list_tables(root, contents.images), None)
        named = tables[0]
        if of_images is not None:
            named = f"{of_images.path.name}:{of_images.columns[0]}".rstrip(":")
        yield (
            f"{root}: not read: {shorten(tables)}; to do so, add --set "
            f"data.classes_from={quote(named)}"
        )
    if outputs := list_outputs(root):
        yield f"{root}: left out, because they are or hold bundles or runs: {shorten(outputs)}"


def describe_single_images(images: ImageFiles) -> Iterator[str]:
    """Describe the classes with a single image, which training leaves out."""
    for target in np.flatnonzero(images.class_counts() == 1):
        yield f"{images.root / images.labels[target]}: only one image; add another"
