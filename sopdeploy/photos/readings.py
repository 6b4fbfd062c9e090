"""The readings of a folder: every way in which it may tell the classes of its images.

A reading is a command that trains. `propose_readings` lists those that the names of folders and
files suggest, and the caller tries each of them before it is used or printed (`choose`). One that
uses nearly all images is taken. Otherwise the user is asked, with the commands to copy.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple, Protocol

from sopdeploy.config import parse_toml
from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import has_image_suffix
from sopdeploy.photos.cells import pair_with_files
from sopdeploy.photos.class_folders import (
    class_in_name,
    find_leftover_paths,
    is_packed,
    no_classes_error,
    suggest_sorting_by_hand,
)
from sopdeploy.photos.files import (
    FILES,
    FOLDERS,
    HELD_OUT,
    LABELS_FILE,
    SUBFOLDERS,
    TRAIN,
    TRAINING,
    Parts,
    is_general,
    list_images,
    lookalike_key,
    part_kind,
    part_of,
)
from sopdeploy.photos.forms import find_other_sizes, find_variants
from sopdeploy.photos.table import OpenedParts
from sopdeploy.photos.table_search import (
    DOCUMENTS,
    find_listing_tables,
    is_word,
    named_table,
    read_texts,
    sample_names,
)

# Where the class may be in a name: before the first digit, in the first two words if most names begin
# with a digit (`10_club_3`), or behind the last one
BEFORE_NUMBER = r"^\D+"
TWO_WORDS = r"^[^\W_]+[\W_]+[^\W\d_]+"
BEHIND_NUMBER = r"\D+$"
SPARSE = 4  # missing numbers of numbered folders per folder; codes such as `A320` have more
SMALL_CLASS = 10  # images that the smallest of uneven numbered classes has
FEW_IMAGES = 3  # that names and subfolders must have per class on average
NEARLY_ALL = 0.9  # share of the images that a reading uses if nobody is asked
MAX_FOLDERS = 3  # that are tried as data sets of their own, those with the most images
MAX_ASKED = 8  # readings that are shown, those that use the most images
PARTS_OF_ONE = "may be parts of one class"  # as folders called by days are
# Words of folders that say what was done with images, not what they show
UNSPECIFIC = {
    *(
        "backup",
        "bak",
        "copy",
        "copies",
        "deleted",
        "example",
        "examples",
        "figures",
        "folder",
        "misc",
    ),
    *("new", "old", "output", "outputs", "plots"),
    *("pred", "preds", "prediction", "predictions", "result", "results", "sample", "samples"),
    *("screenshot", "screenshots", "temp", "tmp"),
    *("sort", "todo", "unknown", "unlabeled", "unlabelled", "unsorted", "untitled"),
    *("neuer", "ordner", "nouveau", "dossier", "nueva", "carpeta"),  # new folder
}
# Names such as `day 1`, `ch12` and `c0`, but not `class 1`; WordNet's have more digits
NUMBERED = re.compile(r"(?!class)\D*[^\W\d]\D*\d{1,3}", re.IGNORECASE)
DATED = re.compile(r"(19|20)\d\d\D?[01]\d\D?[0-3]\d.*")


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


class Tree:
    """The images of a folder, as paths below it, and the folders at its top that hold some.

    Those in the folders *leave_out*, and masks and the like, do not count. Raises `DataError` for a
    folder that cannot be listed.
    """

    def __init__(self, root: Path, leave_out: Collection[str]) -> None:
        paths, others = list_images(root)
        self.root = root
        leftovers = find_leftover_paths(root, paths)
        self.paths = [
            path
            for path in paths
            if os.fsdecode(path).partition("/")[0] not in leave_out and path not in leftovers
        ]
        self.leave_out = ",".join(leave_out)
        self.others = others
        self.images = [os.fsdecode(path) for path in self.paths]
        self.counts = Counter(path.partition("/")[0] for path in self.images if "/" in path)
        # Folders in each folder at the top, with the number of images that each holds itself.
        self.inner = defaultdict[str, Counter[str]](Counter)
        for path in self.images:
            top, _, rest = path.partition("/")
            if "/" in rest:
                self.inner[top][rest.rpartition("/")[0]] += 1

    @property
    def tops(self) -> list[str]:
        """The folders at the top that hold images, sorted."""
        return sorted(self.counts)

    @property
    def numbered(self) -> list[list[str]]:
        """The folders at its top that have a name in common with others except for a number, by this name."""
        by_word = defaultdict[str, list[str]](list)
        for top in filter(NUMBERED.fullmatch, self.tops):
            by_word[_without_digits(top)].append(top)
        return [tops for tops in by_word.values() if len(tops) > 1]

    @property
    def differs_in_numbers(self) -> bool:
        """Whether the names of the folders at its top are the same except for a number."""
        return self.numbered == [self.tops]

    def by_top(self) -> dict[str, list[bytes]]:
        """List the images below each folder at the top."""
        paths = {top: list[bytes]() for top in self.tops}
        for path in self.paths:
            top, separator, _ = path.partition(b"/")
            if separator:
                paths[os.fsdecode(top)].append(path)
        return paths

    def may_hold_classes(self, folder: str) -> bool:
        """Tell whether the folders in *folder* differ in words, and hold several images each.

        Fewer images suffice if another folder at the top holds folders of the same names. Folders
        that differ in a number only are the objects of a class or the days of a camera, unless the
        name of *folder* is no class, such as `images` and `train_shapes`.
        """
        inner = self.inner.get(folder, Counter[str]())
        words = {_without_digits(name) for name in inner}
        of_training = {*re.split(r"[\W_]+", folder.lower())} & {*TRAINING}
        if len(inner) < 2 or (len(words) < 2 and not is_general(folder) and not of_training):
            return False
        is_shared = any(
            inner.keys() == one.keys() for top, one in self.inner.items() if top != folder
        )
        return is_shared or inner.total() >= FEW_IMAGES * len(inner)


def _without_digits(name: str) -> str:
    return re.sub(r"[\d\W_]+", "", name)


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
    # All images in one folder: it is the data set, unless they illustrate a text.
    tops = tree.tops
    if (
        len(tops) == 1
        and tree.inner.get(tops[0])
        and not part_kind(tops[0])
        and tree.counts[tops[0]] == len(tree.images)
    ):
        doubts = [f"{top} {reason}" for top, reason in _shown_in_documents(tree).items()]
        yield Reading(tree.root / tops[0], f"{tops[0]} is the data set", doubt="".join(doubts))
        return
    if len(tops) < 2 or (all(map(part_kind, tops)) and not tree.inner):
        return

    # The folders at the top, also without those that may be no classes.
    holding = [top for top in tops if tree.may_hold_classes(top)]
    holding.sort(key=lambda top: -tree.counts[top])
    doubtful = _doubtful_together(tree) | _doubtful_folders(tree)
    yield _top_folders(tree, _describe_doubt(tree, doubtful, holding))
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


def _describe_doubt(tree: Tree, doubtful: dict[str, str], holding: Sequence[str]) -> str:
    """Say why the folders at the top may not be the classes; "" if nothing tells.

    *doubtful* are those that may be none, and why. *holding* are those that may hold classes.
    """
    if doubtful:
        names_of = defaultdict[str, list[str]](list)
        for name in sorted(doubtful):
            names_of[doubtful[name]].append(name)
        return "; ".join(f"{shorten(names)} {reason}" for reason, names in names_of.items())

    # Parts of the data in each class
    inside = sorted(
        {
            f"{top}/{path}"
            for top in tree.tops
            for path in tree.inner.get(top, ())
            if part_of(f"{path}/") == TRAIN
        }
    )
    if inside:
        return (
            f"they hold parts of the data, {shorten(inside)}; put the parts above the classes"
        )

    # Classes beside folders that hold none, and the same classes in numbered folders
    inner = {frozenset(tree.inner.get(top, ())) for top in tree.tops}
    have_same = tree.differs_in_numbers and len(inner) == 1
    if holding and (have_same or frozenset() in inner):
        return f"the folders in {shorten(holding)} may be the classes"
    return ""


def _doubtful_folders(tree: Tree) -> dict[str, str]:
    """Return the folders at the top that may be no classes by their names, and why."""
    tops = tree.tops
    doubtful = {}
    for top in tops:
        words = [word for word in re.split(r"[\W_\d]+", top.lower()) if word not in ("", "to")]
        others = {lookalike_key(other) for other in tops if other != top}
        without, whole = (
            re.sub(r"[\W_]+", " ", name).strip() for name in (_without_unspecific(top), top)
        )
        if part_kind(top) in HELD_OUT or re.split(r"[\W_]+", top.lower())[-1] in HELD_OUT:
            doubtful[top] = "may hold other photos of the classes"
        elif _may_hold_all(top):
            doubtful[top] = "may hold the images of all classes"
        elif words and (
            UNSPECIFIC.issuperset(words)
            or (without != whole and lookalike_key(without) in others)
        ):
            doubtful[top] = "may be named for what was done with images, not for what they show"
        elif {name.lower() for name in tree.inner.get(top, ())} & others:
            doubtful[top] = (
                "may hold the classes: folders with the names of the others are inside"
            )
    return doubtful


def _doubtful_together(tree: Tree) -> dict[str, str]:
    """Return the folders at the top that may be no classes beside the others, and why.

    Names alone tell nothing of them.
    """
    # Forms of the same pictures, and things of other sizes, such as boards and pieces
    images = tree.by_top()
    forms = find_variants(tree.root, images)
    sizes = find_other_sizes(tree.root, images)
    return {
        **dict.fromkeys(
            sizes, "may show other things, because no other images have such sizes"
        ),
        **dict.fromkeys(forms, "may hold the same pictures in several forms"),
        **_shown_in_documents(tree),
        **_parts_of_one_class(tree),
    }


def _shown_in_documents(tree: Tree) -> dict[str, str]:
    """Return the folders at the top of whose images a document shows most, such as the figures of a report."""
    others = [tree.root / other for other in tree.others]
    documents = [*read_texts(others, DOCUMENTS)]
    shown = {}
    for top, paths in tree.by_top().items():
        names = {path.name for path in sample_names(paths)}
        for document, text in documents:
            num_shown = sum(is_word(name, text) for name in names)
            if num_shown > 1 and 2 * num_shown >= len(names):
                shown[top] = f"may illustrate a text, because {document.name} shows the images"
    return shown


def _parts_of_one_class(tree: Tree) -> dict[str, str]:
    """Return the folders at the top that may be parts of one class, such as days and exercises, and why.

    The names of parts are dates, or differ in a number only.
    """
    dated = [top for top in tree.tops if DATED.fullmatch(top)]
    doubtful = {}
    if len(dated) > 1:
        doubtful = dict.fromkeys(dated, f"{PARTS_OF_ONE}, because their names are dates")

    for family in tree.numbered:
        if reason := _why_parts(tree, family):
            doubtful |= dict.fromkeys(family, f"{PARTS_OF_ONE}, because {reason}")
    return doubtful


def _why_parts(tree: Tree, family: Sequence[str]) -> str:
    """Say why the folders *family*, which differ in a number, may be parts of one class; "" if nothing tells.

    Nobody chose how many images each chapter has, so some have few, or their number is missing, because
    they have none. Of codes such as `A320` and `A380`, nearly all numbers between are missing.
    """
    numbers = {int(re.findall(r"\d+", top)[-1]) for top in family}
    missing = sorted({*range(min(numbers), max(numbers))} - numbers)
    if missing and len(missing) < SPARSE * len(numbers):
        are_missing = "number {} is missing" if len(missing) == 1 else "numbers {} are missing"
        return are_missing.format(shorten([*map(str, missing)]))

    smallest = min(family, key=lambda top: tree.counts[top])
    if tree.counts[smallest] < min(SMALL_CLASS, max(tree.counts[top] for top in family)):
        return f"{smallest} has only {amount(tree.counts[smallest], 'image')}"
    return ""


def _may_hold_all(folder: str) -> bool:
    """Tell whether the name of *folder* says only that it holds images, or of which format."""
    return is_general(folder) or has_image_suffix(f"x.{folder}")


def _without_unspecific(name: str) -> str:
    """Return *name* without `UNSPECIFIC` words, so `b` for `b - Copy` and `b (2)`; *name* itself if it has none."""
    words = re.split(r"([\W_]+)", re.sub(r" ?\(\d+\)$", "", name))
    kept = [word for word in words if word.lower() not in {*UNSPECIFIC, "of"}]
    return "".join(kept)


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
    num_numbers = sum(path.rpartition(b"/")[2][:1].isdigit() for path in paths)
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
        if unread or not errors or any(is_packed(root, other) for other in tree.others):
            raise no_classes_error(root, hint="; ".join(unread))
        of_files = [error for reading, error in errors.items() if reading.classes_from == FILES]
        raise next(iter((*of_files, *errors.values())))

    (best, *others) = tried
    needed = sum(part_of(image) == TRAIN for image in tree.images) or len(tree.images)
    if not others and best.num_used >= NEARLY_ALL * needed and not best.reading.doubt:
        opened = open_reading(best.reading, is_chosen=True)
        # How it was read, unless its own folders are the classes or parts
        notes = [*opened.notes]
        if best.reading.path != root or best.reading.classes_from not in ("", FOLDERS):
            notes.insert(0, f"{root}: read {best.reading.how}")
        # A table inside of the data set has been named by its own reading.
        told = {note.partition(":")[0] for note in opened.notes}
        notes += [line for line in unread if line.partition(":")[0] not in told]
        return opened._replace(notes=notes)

    raise _ambiguous_error(tree, tried, unread)


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
    unsorted = [top for top in tree.tops if _may_hold_all(top) and top not in tree.inner]
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
