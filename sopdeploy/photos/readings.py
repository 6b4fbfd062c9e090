"""The readings of a folder: every way in which it may tell the classes of its images.

A reading is a command that trains. `propose_readings` lists those that the names of folders and
files suggest, and the caller tries each of them before it is used or printed (`choose`). One that
uses nearly all images is taken. Otherwise the user is asked, with the commands to copy.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple, Protocol

from sopdeploy.config import parse_toml
from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.photos.cells import pair_with_files
from sopdeploy.photos.class_folders import (
    class_in_name,
    find_packed,
    no_classes_error,
    suggest_sorting_by_hand,
)
from sopdeploy.photos.doubts import (
    PARTS_OF_ONE,
    describe_doubt,
    find_doubtful,
    may_hold_all,
)
from sopdeploy.photos.files import (
    FILES,
    FOLDERS,
    LABELS_FILE,
    SUBFOLDERS,
    TRAIN,
    TRAINING,
    Parts,
    part_kind,
    part_of,
)
from sopdeploy.photos.table import OpenedParts
from sopdeploy.photos.table_search import find_listing_tables, named_table
from sopdeploy.photos.tree import FEW_IMAGES, Tree

# Where the class may be in a name: before the first digit, in the first two words if most names begin
# with a number of up to two digits (`10_club_3`), or behind the last one
BEFORE_NUMBER = r"^\D+"
TWO_WORDS = r"^[^\W_]+[\W_]+[^\W\d_]+"
BEHIND_NUMBER = r"\D+$"
SHORT_NUMBER = re.compile(rb"\d{1,2}(?!\d)")  # a year is longer
NEARLY_ALL = 0.9  # share of the images that a reading uses if nobody is asked
MAX_FOLDERS = 3  # that are tried as data sets of their own, those with the most images
MAX_ASKED = 8  # readings that are shown, those that use the most images


class Reading(NamedTuple):
    """One way to read a folder: the options of `train`, and in words where the classes are.

    `doubt` says why nobody should take it unasked, even if it is the only one.
    """

    path: Path
    how: str
    classes_from: str = ""
    leave_out: str = ""
    doubt: str = ""

    @property
    def command(self) -> str:
        """The command that trains on it."""
        options = {"classes_from": self.classes_from, "leave_out": self.leave_out}
        settings = [
            f" --set data.{name}={quote(_as_value(value))}"
            for name, value in options.items()
            if value
        ]
        return "".join([f"sopdeploy train --data {quote(str(self.path))}", *settings])


def _as_value(text: str) -> str:
    """Return what `--set` takes as *text*: a text of TOML if it would take it as something else."""
    try:
        parse_toml(f"value = {text}")
    except ValueError:
        if text == text.strip() and text != "null":
            return text
    return json.dumps(text, ensure_ascii=False)


class Tried(NamedTuple):
    """A reading with the parts of the data set that it opens."""

    reading: Reading
    opened: OpenedParts

    @property
    def counts(self) -> dict[str, int]:
        """The number of training images of each class that it trains; without validation images, two or more."""
        train, *held_out = self.opened.parts.values()
        least = 1 if held_out else 2
        counts = zip(train.labels, train.class_counts().tolist(), strict=True)
        return {label: count for label, count in counts if count >= least}

    @property
    def num_used(self) -> int:
        """The number of images that it uses."""
        train, *held_out = self.opened.parts.values()
        num_left_out = 0 if train.is_multi_label else len(train) - sum(self.counts.values())
        return len(train) - num_left_out + sum(map(len, held_out))

    @property
    def partition(self) -> dict[str, frozenset[Path]]:
        """The images of each class in the training part; readings with equal ones are the same."""
        images = next(iter(self.opened.parts.values()))
        files = defaultdict[str, set[Path]](set)
        for index in range(len(images)):
            files[" ".join(images.class_names(index))].add(images.path(index))
        return {label: frozenset(paths) for label, paths in files.items()}

    def describe(self, total: int) -> str:
        """Name the command, its classes with counts, and the images that it leaves over of *total*."""
        _, *held_out = self.opened.parts.values()
        facts = [shorten([f"{label} {count:,}" for label, count in self.counts.items()])]
        if held_out:
            facts.append(f"{amount(sum(map(len, held_out)), 'validation image')}")
        if self.num_used < total:
            facts.append(f"{total - self.num_used:,} of {amount(total, 'image')} left over")
        return f"{self.reading.command} ({'; '.join(facts)})"


class OpenReading(Protocol):
    """Opens a reading as its command does, or as it is read unasked."""

    def __call__(self, reading: Reading, *, is_chosen: bool) -> OpenedParts:
        """Open *reading*; raises `DataError`."""


class AmbiguousFolderError(DataError):
    """A folder that can be read in several ways, or in one that may be wrong; `readings` were tried."""

    readings: Sequence[Tried] = ()


def propose_readings(tree: Tree, parts: Parts, num_part_classes: int) -> list[Reading]:
    """List the readings of *tree* that names suggest, the likeliest one first; none is tried yet.

    *parts* are the parts of its root. *num_part_classes* is the number of folders in the training part,
    or of classes that its table has; 0 without such a part.
    """
    root = tree.root

    # Most images have a file beside them.
    beside = list[Reading]()
    if 2 * len(pair_with_files(tree.images, tree.others)) > len(tree.images):
        beside.append(Reading(root, "by the files beside the images", FILES))

    # A training part of one class cannot train; perhaps its validation part is the data set.
    by_parts = Reading(root, "by the names of its parts")
    if num_part_classes == 1:
        held_out = [Reading(root / name, f"{name} is the data set") for name in parts.held_out]
        return [by_parts, *held_out, *beside]

    # The parts of a data set are certain, unless `train` may be a class beside others.
    if num_part_classes:
        flat = [name for name in parts.others if name in tree.counts and name not in tree.inner]
        if parts.held_out or not flat:
            return [by_parts, *beside]
        parts_only = Reading(root / parts.train, f"{parts.train} is the training part")
        return [parts_only, _top_folders(tree)]

    # Folders, unless only they can be meant also names, then tables.
    proposed = [*_propose_folders(tree)]
    are_classes = len(proposed) == 1 and not proposed[0].doubt and not parts.train
    if not are_classes or tree.differs_in_numbers:
        proposed += _propose_names(tree)
    proposed += [*_propose_tables(tree), *beside]

    # Nothing is proposed: the folders at the top, unless they are parts that hold no folders.
    are_flat_parts = bool(tree.counts) and all(map(part_kind, tree.counts)) and not tree.inner
    if not proposed and not are_flat_parts:
        proposed = [Reading(root, "by the folders at its top")]
    return proposed


def _top_folders(tree: Tree, doubt: str = "") -> Reading:
    return Reading(tree.root, "by the folders at its top", FOLDERS, tree.leave_out, doubt)


def _propose_folders(tree: Tree) -> Iterator[Reading]:
    """Yield the readings in which folders are the classes."""
    # All images in one folder: it is the data set.
    tops = tree.tops
    if (
        len(tops) == 1
        and tree.inner.get(tops[0])
        and not part_kind(tops[0])
        and tree.counts[tops[0]] == len(tree.images)
    ):
        yield Reading(tree.root / tops[0], f"{tops[0]} is the data set")
        return
    if len(tops) < 2 or (all(map(part_kind, tops)) and not tree.inner):
        return

    # The folders at the top, also without those that may be no classes.
    holding = [top for top in tops if tree.may_hold_classes(top)]
    holding.sort(key=lambda top: -tree.counts[top])
    doubtful = find_doubtful(tree)
    yield _top_folders(tree, describe_doubt(tree, doubtful, holding))
    if doubtful and len(tops) - len(doubtful) > 1:
        names = ",".join(filter(None, (tree.leave_out, *sorted(doubtful))))
        yield Reading(tree.root, f"without {names}", FOLDERS, names)

    # Folders that hold classes themselves, and those of all of them together.
    for top in holding[:MAX_FOLDERS]:
        yield Reading(tree.root / top, f"{top} is the data set")
    words = {
        name for inner in tree.inner.values() for path in inner for name in path.split("/")
    }
    if holding and not any(map(part_kind, (*tops, *words))):
        yield Reading(tree.root, "by the innermost folders", SUBFOLDERS)


def _propose_names(tree: Tree) -> Iterator[Reading]:
    """Yield the first pattern that finds classes in the names of nearly all images.

    Each must be in several names on average. If there are parts, the training images count.
    """
    in_training = [
        path
        for path in tree.paths
        if part_kind(os.fsdecode(path).partition("/")[0]) in TRAINING
    ]
    paths = in_training if all(map(part_kind, tree.tops)) and in_training else tree.paths
    num_numbers = sum(bool(SHORT_NUMBER.match(path.rpartition(b"/")[2])) for path in paths)
    beginning = TWO_WORDS if 2 * num_numbers > len(paths) else BEFORE_NUMBER
    for pattern in (beginning, BEHIND_NUMBER):
        counts = Counter(class_in_name(path, pattern) for path in paths)
        found = len(paths) - counts.pop("", 0)
        if len(counts) > 1 and found >= max(NEARLY_ALL * len(paths), FEW_IMAGES * len(counts)):
            how = "by the names of the files"
            yield Reading(tree.root, how, pattern, doubt=f"{how}, which may not be the classes")
            return


def _propose_tables(tree: Tree) -> Iterator[Reading]:
    """Yield the tables in *tree*, or in a folder at its top, that list the images."""
    others = sorted(
        (other for other in tree.others if other.count("/") < 2),
        key=lambda other: (other.count("/"), other),
    )
    for table, column in find_listing_tables(tree.paths, [tree.root / name for name in others]):
        name = table.relative_to(tree.root).as_posix() + (f":{column}" if column else "")
        yield Reading(tree.root, f"by {name}", name)


def choose(tree: Tree, proposed: Sequence[Reading], open_reading: "OpenReading") -> OpenedParts:
    """Try the readings *proposed* of *tree*, and open the only one that uses nearly all images.

    The plain one is opened at once if there is no other, and its error is that of the folder. Raises
    `AmbiguousFolderError` with the readings that can be trained on, and `DataError` if there is
    none.
    """
    root = tree.root
    if len(proposed) == 1 and not proposed[0].doubt:
        (plain,) = proposed
        if plain.path == root and plain.classes_from in ("", FOLDERS):
            return open_reading(plain, is_chosen=True)

    # Readings that cannot be opened are none; one that is ambiguous has several itself. If none can
    # train, the problem of the likeliest one is that of the folder.
    tried = list[Tried]()
    errors = dict[Reading, DataError]()
    for reading in proposed:
        try:
            tried.append(Tried(reading, open_reading(reading, is_chosen=False)))
        except AmbiguousFolderError as error:
            tried += error.readings
        except DataError as error:
            errors[reading] = error
    usable = [one for one in tried if not one.opened.problems and len(one.counts) > 1]
    if tried and not usable:
        return tried[0].opened
    tried = _without_equal(usable)
    described = (
        _describe_unread(reading, error)
        for reading, error in errors.items()
        if reading.classes_from != FILES and named_table(root, reading.classes_from)
    )
    unread = list(dict.fromkeys(described))
    if not tried:
        if unread or not errors or find_packed(root, tree.paths, tree.others):
            raise no_classes_error(root, hint="; ".join(unread))
        of_files = [error for reading, error in errors.items() if reading.classes_from == FILES]
        raise next(iter((*of_files, *errors.values())))

    (best, *others) = tried
    needed = sum(part_of(image) == TRAIN for image in tree.images) or len(tree.images)
    if not others and best.num_used >= NEARLY_ALL * needed and not best.reading.doubt:
        opened = open_reading(best.reading, is_chosen=True)
        return opened._replace(notes=_describe_chosen(root, best.reading, opened, unread))

    raise _ambiguous_error(tree, tried, unread)


def _describe_chosen(
    root: Path, reading: Reading, opened: OpenedParts, unread: Sequence[str]
) -> list[str]:
    """Return the notes of *opened*, the *reading* of *root* that was chosen, with *unread*, lines about tables."""
    # How it was read, unless its own folders are the classes or parts
    notes = [*opened.notes]
    if reading.path != root or reading.classes_from not in ("", FOLDERS):
        notes.insert(0, f"{root}: read {reading.how}")

    # A table inside of the data set has been named by its own reading.
    told = {note.partition(":")[0] for note in opened.notes}
    return notes + [line for line in unread if line.partition(":")[0] not in told]


def _ambiguous_error(
    tree: Tree, tried: Sequence[Tried], unread: Sequence[str]
) -> AmbiguousFolderError:
    """Build the error that asks which of the readings *tried* is meant; *unread* are lines about tables."""

    # Doubtful readings are the last ones, because the first one is copied, and of these the folders at
    # the top.
    def is_doubtful(one: Tried) -> tuple[bool, bool]:
        doubt = one.reading.doubt != ""
        return doubt, doubt and one.reading.classes_from == FOLDERS

    shown = sorted(tried, key=lambda one: one.num_used, reverse=True)[:MAX_ASKED]
    shown.sort(key=lambda one: (is_doubtful(one), tried.index(one)))

    # The doubt about the folders at the top, or about the only reading
    doubts = [
        one.reading.doubt
        for one in tried
        if len(tried) == 1 or one.reading.classes_from == FOLDERS
    ]
    if tree.differs_in_numbers and any(
        one.reading.classes_from in (BEFORE_NUMBER, TWO_WORDS, BEHIND_NUMBER) for one in tried
    ):
        told = "the names of the files tell other classes"
        doubts.append(f"{shorten(tree.tops)} {PARTS_OF_ONE}, because {told}")
    doubt = next((f" ({doubt})" for doubt in doubts if doubt), "")
    if len(tried) > 1:
        question = f"may be read in {len(tried)} ways{doubt}; run the one that you mean: "
    elif doubt:
        question = f"is read as it is only if you say so{doubt}; to do so, run: "
    else:
        question = "no reading uses nearly all images; for some, run: "

    commands = [one.describe(len(tree.images)) for one in shown]
    ambiguous = AmbiguousFolderError(
        f"{tree.root}: {question}"
        + "; or ".join(commands)
        + _suggest_sorting(tree)
        + "".join(f"; {line}" for line in unread),
        lists={"readings": [one.reading.command for one in shown]},
    )
    ambiguous.readings = shown
    return ambiguous


def _describe_unread(reading: Reading, error: DataError) -> str:
    """Say that the table of *reading* lists the images, but is not read."""
    name = reading.classes_from.partition(":")[0]
    reason = str(error).removeprefix(f"{reading.path / name}: ").partition(";")[0]
    return (
        f"{reading.path / name}: lists the images, but is not read; if the classes are in "
        f"it, save it as {reading.path / LABELS_FILE} with the columns file,classes (the name of an "
        f"image is enough, without its folder or suffix; {reason})"
    )


def _suggest_sorting(tree: Tree) -> str:
    """Say how the first folder that may hold the images of all classes, unsorted, can be sorted."""
    unsorted = [top for top in tree.tops if may_hold_all(top) and top not in tree.inner]
    if not unsorted:
        return ""
    by_hand = suggest_sorting_by_hand(tree.root / unsorted[0])
    return f"; or sort {unsorted[0]} into one subfolder per class{by_hand}"


def _without_equal(tried: Sequence[Tried]) -> list[Tried]:
    """Keep one of the readings with equal classes of equal images, the first without a doubt."""
    kept = dict[object, Tried]()
    for one in tried:
        key = frozenset(one.partition.values())
        if key not in kept or (kept[key].reading.doubt and not one.reading.doubt):
            kept[key] = one
    return [*kept.values()]
