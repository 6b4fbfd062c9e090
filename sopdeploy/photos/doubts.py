"""Why the folders at the top of a data set may not be its classes: their names, and what they hold."""

import re
from collections import defaultdict
from collections.abc import Sequence

from sopdeploy.errors import amount, shorten
from sopdeploy.images.signatures import has_image_suffix
from sopdeploy.photos.files import (
    HELD_OUT,
    TRAIN,
    is_general,
    lookalike_key,
    part_kind,
    part_of,
)
from sopdeploy.photos.forms import find_variants
from sopdeploy.photos.tree import Tree

SPARSE = 4  # missing numbers of numbered folders per folder; codes such as `A320` have more
# Words before a number that count parts of a collection, not kinds of things; also in the plural
UNITS = {
    *("assignment", "batch", "ch", "chapter", "day", "exercise", "fold", "homework", "lab"),
    *("lecture", "lesson", "mod", "module", "part", "session", "shard", "week"),
}
SMALL_CLASS = 10  # images that the smallest of uneven numbered classes has
PARTS_OF_ONE = "may be parts of one class"  # as folders called by days are
# Words of folders that say what was done with images, not what they show
UNSPECIFIC = {
    *("backup", "bak", "copy", "copies", "example", "examples", "folder", "misc", "new", "old"),
    *("assets", "doc", "docs", "figures", "output", "outputs", "static"),
    *("pred", "preds", "prediction", "predictions", "result", "results", "sample", "samples"),
    *("screenshot", "screenshots", "temp", "tmp"),
    *("sort", "todo", "unknown", "unlabeled", "unlabelled", "unsorted", "untitled"),
    *("neuer", "ordner", "nouveau", "dossier", "nueva", "carpeta"),  # new folder
}
DATED = re.compile(r"(19|20)\d\d\D?[01]\d\D?[0-3]\d.*")


def find_doubtful(tree: Tree) -> dict[str, str]:
    """Return the folders at the top that may be no classes, and why."""
    return _find_doubtful_together(tree) | _find_doubtful_names(tree)


def describe_doubt(tree: Tree, doubtful: dict[str, str], holding: Sequence[str]) -> str:
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

    # Classes in a training folder, beside other photos only, or the same in numbered folders
    inner = {frozenset(tree.inner.get(top, ())) for top in tree.tops}
    have_same = tree.differs_in_numbers and len(inner) == 1
    beside = [top for top in tree.tops if top not in tree.inner]
    are_general = bool(beside) and all(is_general(_without_unspecific(top)) for top in beside)
    if holding and (have_same or are_general or any(map(tree.is_training, holding))):
        return f"the folders in {shorten(holding)} may be the classes"
    return ""


def _find_doubtful_names(tree: Tree) -> dict[str, str]:
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
        elif may_hold_all(top):
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


def _find_doubtful_together(tree: Tree) -> dict[str, str]:
    """Return the folders at the top that may be no classes beside the others, and why.

    Names alone tell nothing of them.
    """
    forms = find_variants(tree.root, tree.by_top())
    return {
        **dict.fromkeys(forms, "may hold the same pictures in several forms"),
        **_parts_of_one_class(tree),
    }


def _parts_of_one_class(tree: Tree) -> dict[str, str]:
    """Return the folders at the top that may be parts of one class, such as days and exercises, and why.

    The names of parts are dates, or differ in a number only.
    """
    dated = [top for top in tree.tops if DATED.fullmatch(top)]
    doubtful = {}
    if len(dated) > 1:
        doubtful = dict.fromkeys(dated, f"{PARTS_OF_ONE}, because their names are dates")

    for family in tree.numbered:
        are_all = tree.differs_in_numbers
        if (are_all or _is_unit(family[0])) and (reason := _why_parts(tree, family)):
            doubtful |= dict.fromkeys(family, f"{PARTS_OF_ONE}, because {reason}")
    return doubtful


def _why_parts(tree: Tree, family: Sequence[str]) -> str:
    """Say why the folders *family*, which differ in a number, may be parts of one class; "" if nothing tells.

    Nobody chose how many images each chapter has, so some have few, or their number is missing, because
    they have none. Folders whose numbers are far apart, such as `A320` and `A380`, are none. Beside
    other folders, few images tell nothing.
    """
    numbers = {int(re.findall(r"\d+", top)[-1]) for top in family}
    missing = sorted({*range(min(numbers), max(numbers))} - numbers)
    if missing and len(missing) < SPARSE * len(numbers):
        are_missing = "number {} is missing" if len(missing) == 1 else "numbers {} are missing"
        return are_missing.format(shorten([*map(str, missing)]))

    if not tree.differs_in_numbers:
        return ""
    smallest = min(family, key=lambda top: tree.counts[top])
    if tree.counts[smallest] < min(SMALL_CLASS, max(tree.counts[top] for top in family)):
        return f"{smallest} has only {amount(tree.counts[smallest], 'image')}"
    return ""


def _is_unit(folder: str) -> bool:
    """Tell whether the word before the number of *folder* is one of `UNITS`."""
    word = re.split(r"[\W\d_]+", folder.lower().rstrip("0123456789_- ."))[-1]
    return word in UNITS or word.removesuffix("s") in UNITS


def may_hold_all(folder: str) -> bool:
    """Tell whether the name of *folder* says only that it holds images, or of which format."""
    return is_general(folder) or has_image_suffix(f"x.{folder}")


def _without_unspecific(name: str) -> str:
    """Return *name* without `UNSPECIFIC` words, so `b` for `b - Copy` and `b (2)`; *name* itself if it has none."""
    words = re.split(r"([\W_]+)", re.sub(r" ?\(\d+\)$", "", name))
    kept = [word for word in words if word.lower() not in {*UNSPECIFIC, "of"}]
    return "".join(kept)
