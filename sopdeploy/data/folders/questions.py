"""What a folder is asked about: why its folders may not be the classes, and the commands that say what is.

Names, depths and numbers of files decide. CSV files beside the images are only opened to propose them.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from sopdeploy.base.config import parse_toml
from sopdeploy.data.folders.cells import is_table
from sopdeploy.data.folders.class_folders import (
    class_in_name,
    describe_joined,
    find_joined,
)
from sopdeploy.data.folders.table_search import list_needed, list_tables
from sopdeploy.data.photos.contents import Contents
from sopdeploy.data.photos.parts import (
    FOLDERS,
    HELD_OUT,
    PATHS,
    SUBFOLDERS,
    TRAINING,
    is_general,
    part_kind,
)
from sopdeploy.data.photos.photo import ImageFiles, LabeledImages
from sopdeploy.errors import DataError, amount, shorten

# Words of folders that are rarely classes: parts of data sets, forms of pictures, and what was done with them
NO_CLASSES = {
    *("annotation", "annotations", "label", "labels", "labelled", "labeled", "mask", "masks"),
    *(
        "groundtruth",
        "gt",
        "seg",
        "segmim",
        "segmentation",
        "segmentations",
        "segmented",
        "trimap",
    ),
    *("trimaps", "crop", "crops", "cropped", "resized", "aug", "augmented", "augmentation"),
    *(
        "augmentations",
        "thumb",
        "thumbs",
        "thumbnail",
        "thumbnails",
        "rgb",
        "depth",
        "ir",
        "discards",
    ),
    *(
        "jpg",
        "jpeg",
        "jpegs",
        "png",
        "gray",
        "grayscale",
        "original",
        "originals",
        "processed",
        "raw",
    ),
    *("backup", "bak", "old", "new", "copy", "copies", "kopie", "copie", "copia", "example"),
    *(
        "examples",
        "folder",
        "misc",
        "sample",
        "samples",
        "duplicates",
        "unused",
        "discarded",
    ),
    *(
        "assets",
        "asset",
        "doc",
        "docs",
        "figure",
        "figures",
        "fig",
        "output",
        "outputs",
        "static",
    ),
    *(
        "cache",
        "tmp",
        "temp",
        "pred",
        "preds",
        "prediction",
        "predictions",
        "predicted",
        "result",
    ),
    *("results", "screenshot", "screenshots", "unlabeled", "unlabelled", "unknown", "unsorted"),
    *(
        "unnamed",
        "untitled",
        "archive",
        "archives",
        "preview",
        "previews",
        "plots",
        "plot",
        "log",
    ),
    *("logs", "download", "downloads", "data", "dataset", "datasets", "image", "images", "img"),
    *(
        "imgs",
        "photo",
        "photos",
        "pic",
        "pics",
        "picture",
        "pictures",
        "video",
        "videos",
        "frames",
    ),
}
PARTS = {*TRAINING, *HELD_OUT}
MASK_OF = re.compile(
    r"[\W_](masks?|seg|gt|trimap|segmentation|annotation)[\W_\d]*$", re.IGNORECASE
)
NUMBERED = re.compile(r"(?!class)(.*[^\W\d].*?)\d{1,3}\W*", re.IGNORECASE)  # not WordNet's IDs
DATE = re.compile(
    r"(19|20)\d\d\D?[01]\d\b|[0-3]?\d[.-][01]?\d[.-](19|20)?\d\d|(19|20)\d\d[01]\d[0-3]\d"
)
A_TENTH = 10
BEFORE_NUMBER = r"^\D+"  # the class in names such as `cat.12.jpg`
PER_CLASS = 3  # images that a class in the names of files has on average
MAX_COMMANDS = 4
MAX_DATA_SETS = 2  # folders inside that are proposed
Doubts = dict[str, list[str]]  # why folders may not be classes, and which


class Reading(NamedTuple):
    """One way to read a folder, as options of `train`."""

    path: Path
    classes_from: str = ""
    leave_out: str = ""

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


class QuestionError(DataError):
    """It is not certain what the classes in a folder are; `commands` say it, each with its classes."""

    commands: Sequence[tuple[str, str]] = ()


def doubt_folders(contents: Contents) -> Doubts:
    """Return why the folders at the top of *contents* may not be the classes; empty if they are."""
    tops = contents.tops
    doubts = Doubts()
    deep = {
        os.fsdecode(path).partition("/")[0] for path in contents.images if path.count(b"/") > 1
    }
    if deep:
        doubts["hold folders with images"] = sorted(deep)
    if A_TENTH * contents.num_beside > len(contents.images):
        doubts["images beside the folders"] = []
    if named := _name_no_classes(tops):
        doubts["may not be classes, by their names"] = named
    if repeated := _name_repeated({*tops} - {*named}):
        doubts["repeat the names of others"] = repeated

    # Parts of a collection
    stems = defaultdict[str, list[str]](list)
    for top in tops:
        if match := NUMBERED.fullmatch(top):
            stems[match[1]].append(top)
    numbered = max(stems.values(), key=len, default=[])
    if len(numbered) > 1 and 2 * len(numbered) >= len(tops):
        doubts["differ in numbers only, as parts of a collection do"] = sorted(numbered)
    if dates := [top for top in tops if DATE.match(top)]:
        doubts["may be dates"] = sorted(dates)

    masks = _find_masks(contents)
    if A_TENTH * len(masks) > len(contents.images):
        doubts["hold files named as masks of others"] = sorted(
            {mask.partition("/")[0] for mask in masks}
        )
    if len(tops) < 2 and not doubts:
        doubts["is the only one"] = sorted(tops)
    if tables := _find_other_classes(contents):
        doubts["with other classes for all images"] = tables
    return doubts


def doubt_parts(parts: Mapping[str, Contents], unused: Sequence[str]) -> Doubts:
    """Return why the folders in the training part, the first of *parts*, may not be the classes.

    Without a held-out part, *unused* folders beside it may be classes like it.
    """
    training, *held_out = parts.values()
    doubts = doubt_folders(training)
    if unused and not any(part.tops for part in held_out):
        doubts["are beside the training part"] = sorted(unused)
    return doubts


def ask(
    contents: Contents,
    parts: Mapping[str, Contents],
    doubts: Doubts,
    leave_out: str,
    open_training: Callable[[Reading], LabeledImages],
) -> QuestionError | None:
    """Build the question about a folder with *doubts*; None if there is nothing to choose.

    *open_training* opens the training images of a reading; it raises `DataError`.
    """
    proposed = _propose(contents, parts, doubts, leave_out)
    described = dict(islice(_describe(proposed, open_training), MAX_COMMANDS))
    if not described and not all(map(part_kind, contents.tops)):
        described = dict(_describe([Reading(contents.root, FOLDERS, leave_out)], open_training))
    if not described:
        return None

    held = [f"{name} {count:,}" for name, count in contents.tops.most_common()]
    if contents.num_beside:
        held.append(f"{amount(contents.num_beside, 'image')} in no folder")
    reasons = "; ".join(
        f"{shorten(names)} {reason}" for reason, names in doubts.items() if names
    )
    shown = [f"{command} ({classes})" for command, classes in described.items()]
    error = QuestionError(
        f"{contents.root}: what are the classes? It holds {shorten(held)}"
        f"{f' ({reasons})' if reasons else ''}. Run the command that you mean: {'; or '.join(shown)}",
        lists={"readings": [*described]},
    )
    error.commands = [*described.items()]
    return error


def _find_masks(contents: Contents) -> list[str]:
    """List the images, without suffix, that add a word for masks to the name of another one."""
    files = {os.fsdecode(path).rpartition(".")[0] for path in contents.images}
    return [file for file in files if MASK_OF.sub("", file) in files - {file}]


def _find_other_classes(contents: Contents) -> list[str]:
    """Name the CSV files beside the folders that give all images classes other than these folders."""
    if not any(map(is_table, contents.files)):
        return []
    return [
        table.path.name
        for table in list_tables(contents.root, contents.images)
        if table.lists_all and table.names_classes and not table.repeats_folders
    ]


def _name_no_classes(names: Iterable[str]) -> list[str]:
    """List those of *names* that are not classes, or that add a word of `NO_CLASSES` to another one, sorted."""
    words = {name: _words(name) for name in names}

    def is_doubtful(name: str) -> bool:
        mine = words[name]
        added = [mine - other for other in words.values() if other and mine > other]
        adds = any(more <= NO_CLASSES or all(map(str.isdigit, more)) for more in added)
        return _is_not_a_class(name) or adds or (len(mine) > 1 and not mine.isdisjoint(PARTS))

    return sorted(filter(is_doubtful, words))


def _name_repeated(names: Iterable[str]) -> list[str]:
    """List the folders that add the same words to each of the others: `cat`, `dog`, `cat_v2`, `dog_v2`."""
    words = {name: _words(name) for name in names}
    added = defaultdict[frozenset[str], dict[str, str]](
        dict
    )  # words -> name: the name that it extends
    for name, mine in words.items():
        for other, theirs in words.items():
            if theirs and mine > theirs:
                added[frozenset(mine - theirs)][name] = other
    extended = {name for of_words in added.values() for name in of_words}
    bases = {*words} - extended
    return sorted(
        name
        for of_words in added.values()
        if len(bases) > 1 and bases <= {*of_words.values()}
        for name in of_words
    )


def _is_not_a_class(name: str) -> bool:
    """Tell whether *name* is that of a part, says only that it holds images, or has `NO_CLASSES` only."""
    words = {word for word in _words(name) if not word.isdigit()}
    says_nothing = words <= NO_CLASSES or re.sub(r"[\W\d_]+", "", name.lower()) in NO_CLASSES
    return bool(part_kind(name)) or is_general(name) or bool(words and says_nothing)


def _words(name: str) -> set[str]:
    """Return the words and numbers of *name* in small letters, also those of `JPEGImages`."""
    found = re.findall(r"[A-Z]{2,}(?![a-z])|[A-Z]?[^\W\d_A-Z]+|[A-Z]|\d+", name)
    return {word.lower() for word in found}


def _propose(
    contents: Contents, parts: Mapping[str, Contents], doubts: Doubts, leave_out: str
) -> Iterator[Reading]:
    """Yield the readings of *contents*, the likeliest first."""
    root = contents.root
    training = next(iter(parts.values()), contents)
    images = list_needed(training)[0]

    # Names of folders that are not classes
    def without(*names: str) -> str:
        return ",".join(filter(None, [leave_out, *names]))

    folders = {name for path in images for name in os.fsdecode(path).split("/")[1:-1]}
    forms = [name for name in sorted(folders) if _is_not_a_class(name) and not is_general(name)]

    # Data sets inside, unless it is divided into parts. If their classes have equal names, all of them
    # are likelier one data set.
    is_divided = training.root != root and all(map(part_kind, contents.tops))
    base = root if is_divided else training.root
    inside = [] if is_divided else _find_data_sets(contents)
    joined = {name for name in find_joined(images) if not _is_not_a_class(name)}
    if not joined:
        yield from (Reading(root / folder, leave_out=leave_out) for folder in inside)

    yield from _propose_tables(contents, training, parts)

    # A number does not mean the same in every folder, a name mostly does.
    if joined:
        are_numbers = all(re.fullmatch(r".*\d\W*", name) for name in joined)
        for way in (PATHS, SUBFOLDERS) if are_numbers else (SUBFOLDERS, PATHS):
            yield Reading(root, way, without(*forms))
        yield from (Reading(root / folder, leave_out=leave_out) for folder in inside)

    # The folders without those that are not classes
    if masks := _find_masks(training):
        words = sorted({match[1] for mask in masks if (match := MASK_OF.search(mask))})
        yield Reading(base, FOLDERS, without(*(f"*{word}*" for word in words)))
    elif forms:
        yield Reading(base, FOLDERS, without(*forms))
    named = [name for reason, names in doubts.items() if "names" in reason for name in names]
    others = {*training.tops} - {*named}
    if named and len(others) > 1:
        yield Reading(base, FOLDERS, without(*dict.fromkeys(named)))

    # Names of files, innermost folders, and the folders as they are
    counts = Counter(class_in_name(path, BEFORE_NUMBER) for path in images)
    if "" not in counts and len(images) >= PER_CLASS * len(counts):
        yield Reading(root, BEFORE_NUMBER, leave_out)
    innermost = {path.rpartition(b"/")[0].rpartition(b"/")[2] for path in images}
    if not all(_is_not_a_class(os.fsdecode(name)) for name in innermost):
        yield Reading(root, SUBFOLDERS, leave_out)
    if is_divided and not all(map(_is_not_a_class, training.tops)):
        yield Reading(root, FOLDERS, leave_out)
    for one in (training, contents):
        if not all(map(_is_not_a_class, one.tops)):
            yield Reading(one.root, FOLDERS, leave_out)


def _propose_tables(
    contents: Contents, training: Contents, parts: Mapping[str, Contents]
) -> Iterator[Reading]:
    """Yield the CSV files in the folder that list images, and those of the training part, perhaps of all parts."""
    for one in dict.fromkeys((contents.root, training.root)):
        images = contents.images if one == contents.root else training.images
        for table in list_tables(one, images):
            is_in_all = bool(parts) and all(
                table.path.name in part.files for part in parts.values()
            )
            for column in table.columns:
                where = contents.root if is_in_all else one
                yield Reading(where, f"{table.path.name}:{column}".rstrip(":"))


def _find_data_sets(contents: Contents) -> list[str]:
    """List the folders inside whose folders may be classes, or that hold parts with some; the largest first."""
    children = defaultdict[str, Counter[str]](Counter)
    for path in contents.images:
        parent, _, name = os.fsdecode(path).rpartition("/")[0].rpartition("/")
        children[parent][name] += 1
    sizes = Counter[str]()
    for parent, names in children.items():
        if len(names) > 1 and not all(map(_is_not_a_class, names)):
            above, _, name = parent.rpartition("/")
            sizes[above if part_kind(name) else parent] += names.total()
    return [folder for folder, _ in sizes.most_common() if folder][:MAX_DATA_SETS]


def _describe(
    readings: Iterable[Reading], open_training: Callable[[Reading], LabeledImages]
) -> Iterator[tuple[str, str]]:
    """Yield the command and the classes of each of *readings* with two classes, each set of images once."""
    shown = set[object]()
    for reading in readings:
        try:
            images = open_training(reading)
        except QuestionError as error:
            yield from error.commands
            continue
        except DataError:
            continue
        counts = dict(zip(images.labels, images.class_counts().tolist(), strict=True))
        key = frozenset(counts.items())
        if len(counts) > 1 and key not in shown:
            shown.add(key)
            classes = shorten([f"{label} {count:,}" for label, count in counts.items()])
            joined = {}
            if reading.classes_from == SUBFOLDERS and isinstance(images, ImageFiles):
                joined = find_joined(images.paths.tolist())
            if joined:
                classes += f"; joins {describe_joined(joined)}"
            yield reading.command, classes


def _as_value(text: str) -> str:
    """Return what `--set` takes as *text*: a text of TOML if it would take it as something else."""
    try:
        parse_toml(f"value = {text}")
    except ValueError:
        if text == text.strip() and text != "null":
            return text
    return json.dumps(text, ensure_ascii=False)
