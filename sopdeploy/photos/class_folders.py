"""Class folders: the images of each, sorted, and what the user may not have intended.

The name of a folder is the class of its images or, with a pattern, a part of each file's name is.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import NamedTuple

import numpy as np

from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.files import POINTER_ADVICE, is_pointer
from sopdeploy.images.limits import describe_formats
from sopdeploy.images.signatures import (
    OF_DOCUMENTS,
    count_suffixes,
    describe_conversion,
    describe_suffixes,
    find_converter,
    suffix_of,
)
from sopdeploy.paths import ARCHIVES, COMPRESSED
from sopdeploy.photos.files import (
    FOLDERS,
    SUBFOLDERS,
    TRAINING,
    check_labels,
    describe_confusable,
    folder_identity,
    list_files,
    list_images,
    list_subfolders,
    lookalike_key,
    normalize,
    part_kind,
)
from sopdeploy.photos.forms import find_leftovers
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.photos.table_search import TABLE_SUFFIXES

# Of files with many images, which no command converts; .h5 and .pkl are more often networks
ARRAYS = (".lmdb", ".mat", ".npy", ".npz", ".parquet", ".tfrecord")
# `buses` and `houses` are cut like `bus` and `house`
ENDINGS = {r"(?<=\w{3})(?<!s)s$": "", r"(?<=\w{3})e$": "", r"(?<=\w{2})y$": "i"}


class ClassListing(NamedTuple):
    """What class folders hold, with paths relative to the root of `images`.

    `other_files` are, by class, the files that are no images, `beside` the images of no class.
    `notes` name what is left out and what may be a mistake.
    """

    images: ImageFiles
    other_files: dict[str, list[str]]
    beside: list[bytes]
    notes: list[str]


def list_classes(
    root: Path, classes_from: str = "", leave_out: Collection[str] = ()
) -> ClassListing:
    """List the images of every class folder in *root*, sorted; a class may be empty.

    The folders *leave_out* are none, and neither is a folder of programs, texts or arrays only.

    Folders with one name in two encodings are one class. The images of a folder in a class
    folder are a group, unless it holds all images of the class. A link in a class folder to
    another class folder is not followed. Masks, photographs in another form (`find_leftovers`),
    and classes that hold nothing else are left out, unless *classes_from* is `FOLDERS`.

    If *classes_from* is `SUBFOLDERS`, the innermost folder of each image is its class.

    If *classes_from* is a regular expression, it finds the class in the name of each image below
    *root*, also of those in no class folder. Folders then tell neither classes nor groups.
    """
    paths_of_class, other_files = _list_folders(root, leave_out)
    beside, _ = list_files(root)
    notes = list[str]()

    # What is no class, and no photograph of its own.
    paths_of_class = _without_other_folders(root, paths_of_class, other_files, notes)
    if classes_from != FOLDERS:
        paths_of_class = _without_leftovers(root, paths_of_class, notes)

    # With a pattern, the names of files tell the classes, not the folders.
    if classes_from not in ("", FOLDERS):
        paths = [*chain.from_iterable(paths_of_class.values())]
        paths += map(os.fsencode, beside if is_pattern(classes_from) else ())
        return _list_by_name(root, sorted(paths), other_files, classes_from, notes)

    images = _list_by_folder(root, paths_of_class, notes)
    notes += [f"{root}: {line}" for line in _describe_names(images.labels)]
    return ClassListing(images, other_files, [*map(os.fsencode, beside)], notes)


def _list_by_folder(
    root: Path, paths_of_class: dict[str, list[bytes]], notes: list[str]
) -> ImageFiles:
    """Return the images of the folders in *root*; *notes* names folders in those of the classes."""
    # A class folder's entry that holds each image: the folder `cat/x` for `cat/x/1.jpg` and for
    # `cat/x/y/2.jpg`, the file itself for `cat/3.jpg`.
    labels = tuple(sorted(paths_of_class))
    paths = list[bytes]()
    groups = list[bytes]()
    targets = list[int]()
    nested = set[bytes]()
    for target, label in enumerate(labels):
        class_paths = paths_of_class[label]
        entries = [b"/".join(path.split(b"/")[:2]) for path in class_paths]
        if len({*entries}) > 1:
            nested |= {*entries} - {*class_paths}  # the other entries are images themselves
            groups += entries
        else:  # one folder with all images tells nothing: each image is a group of its own
            groups += class_paths
        targets += [target] * len(class_paths)
        paths += class_paths

    # What the user may not have intended.
    if nested:
        names = shorten(sorted(map(os.fsdecode, nested)))
        notes.append(
            f"{root}: images of folders in a class folder count as images of that "
            "class, and each of several folders as one group: "
            f"{names}; add --set data.classes_from={SUBFOLDERS} if they are classes"
        )

    no_two_together = len(set(groups)) == len(groups)
    known_groups = None if no_two_together else np.asarray(groups, dtype=np.bytes_)
    return ImageFiles(
        root, labels, np.asarray(paths, np.bytes_), np.asarray(targets, np.int64), known_groups
    )


def _without_other_folders(
    root: Path,
    paths_of_class: dict[str, list[bytes]],
    other_files: dict[str, list[str]],
    notes: list[str],
) -> dict[str, list[bytes]]:
    """Leave out folders that hold only *other_files*, which may be no photographs; name them in *notes*."""
    left_out = [
        label
        for label, files in other_files.items()
        if files and not paths_of_class[label] and not any(map(_may_hold_photographs, files))
    ]
    if left_out:
        notes.append(f"{root}: left out, because they hold no images: {shorten(left_out)}")
    return {label: paths for label, paths in paths_of_class.items() if label not in left_out}


def _without_leftovers(
    root: Path, paths_of_class: dict[str, list[bytes]], notes: list[str]
) -> dict[str, list[bytes]]:
    """Leave out images that are no photographs of their own (`find_leftovers`), and name them in *notes*."""
    for leftover in find_leftovers(root, paths_of_class):
        remaining = {
            label: [path for path in paths if path not in leftover.paths]
            for label, paths in paths_of_class.items()
        }
        # A folder that holds nothing else is no class. One that was empty before stays: it is
        # reported later.
        paths_of_class = {
            label: paths
            for label, paths in remaining.items()
            if paths or not paths_of_class[label]
        }
        where = sorted({str(Path(os.fsdecode(path)).parent) for path in leftover.paths})
        notes.append(
            f"{root}: left out, because they are {leftover.content}: "
            f"{amount(len(leftover.paths), 'image')} in {shorten(where)}"
        )
    return paths_of_class


def find_leftover_paths(root: Path, paths: Sequence[bytes]) -> set[bytes]:
    """Find the images *paths* in *root* that are no photographs of their own."""
    paths_of_class = defaultdict[str, list[bytes]](list)
    for path in paths:
        top, separator, _ = path.partition(b"/")
        if separator:
            paths_of_class[os.fsdecode(top)].append(path)
    return set[bytes]().union(*(one.paths for one in find_leftovers(root, paths_of_class)))


def _may_hold_photographs(file: str) -> bool:
    """Tell whether *file* is an archive, or has the suffix of an image format that is not read."""
    converter = find_converter(suffix_of(file))
    return file.lower().endswith(ARCHIVES) or converter not in ("", *OF_DOCUMENTS)


def find_packed(where: Path, images: Sequence[bytes], others: Sequence[str]) -> list[str]:
    """List those of *others* in *where* that stand for files that are not there yet.

    These are archives and, directly in *where*, compressed tables and pointers; a pointer below may be
    of weights. A folder that holds some of the *images* has been unpacked.
    """
    unpacked = {os.fsdecode(path).partition("/")[0] for path in images if b"/" in path}
    return [
        file
        for file in others
        if (_is_packed(file) and file.partition("/")[0] not in unpacked)
        or ("/" not in file and is_pointer(where / file))
    ]


def _is_packed(file: str) -> bool:
    """Tell whether *file* is an archive, or a compressed table that is not in a folder, as logs are."""
    name = PurePosixPath(file.lower())
    is_compressed = name.suffix in COMPRESSED and name.with_suffix("").suffix in TABLE_SUFFIXES
    return name.name.endswith(ARCHIVES) or (is_compressed and "/" not in file)


def advise_on_files(where: Path, files: Sequence[str]) -> str:
    """Say what makes images of *files* in *where*, which are none; "" if it is not known."""
    # A pointer stands for any file. An archive may hold all images.
    for file in files:
        if is_pointer(where / file):
            return f"{where / file} is {POINTER_ADVICE}"
    if archives := [file for file in files if _is_packed(file)]:
        return f"unpack {shorten(archives)}"

    # Other formats, of one image each or of many; a few documents are no photographs.
    most = next(iter(count_suffixes(files)), "")
    for file in files:
        if suffix_of(file) != most and find_converter(suffix_of(file)) in OF_DOCUMENTS:
            continue
        if conversion := describe_conversion(where, file, files):
            return conversion
    for file in files:
        if file.lower().endswith(ARRAYS):
            return f"write the images of {file} to image files, in one subfolder per class"
    return ""


def _list_folders(
    root: Path, leave_out: Collection[str]
) -> tuple[dict[str, list[bytes]], dict[str, list[str]]]:
    """List the images and the other files of each class folder in *root* but *leave_out*, by class."""
    folders = defaultdict[str, list[str]](list)  # names of folders by class
    for name in list_subfolders(root):
        if name not in leave_out:
            folders[normalize(name)].append(name)
    check_labels(root, sorted(folders))

    # A folder that a link leads to is listed in its own class only.
    visited = {folder_identity(root / name) for names in folders.values() for name in names}
    images = dict[str, list[bytes]]()
    other_files = dict[str, list[str]]()
    for label in sorted(folders):
        images[label] = []
        other_files[label] = []
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
    """Sort the images *paths* in *root* by the classes that *pattern* finds in their names.

    With `SUBFOLDERS` as *pattern*, the class is the name of the folder that holds the image.

    Images without a class, and lookalike classes, are named in *notes*.
    """
    if pattern == SUBFOLDERS:
        parents = [os.fsdecode(path).rpartition("/")[0] for path in paths]
        label_of_path = [normalize(parent.rpartition("/")[2]) for parent in parents]
    else:
        label_of_path = [class_in_name(path, pattern) for path in paths]  # "" without a class
    labels = tuple(sorted(filter(None, set(label_of_path))))
    check_labels(root, labels)
    without = [path for path, label in zip(paths, label_of_path, strict=True) if not label]
    if without and labels:
        names = shorten([*map(os.fsdecode, without)])
        notes.append(
            f"{root}: {amount(len(without), 'image')} left out, in whose names "
            f"{pattern!r} finds no class: {names}"
        )
    kept = [path for path, label in zip(paths, label_of_path, strict=True) if label]
    targets = [labels.index(label) for label in label_of_path if label]
    images = ImageFiles(
        root, labels, np.asarray(kept, np.bytes_), np.asarray(targets, np.int64)
    )
    notes += [f"{root}: {line}" for line in _describe_names(labels)]
    return ClassListing(images, other_files, without, notes)


def _describe_names(labels: Sequence[str]) -> Iterator[str]:
    """Describe *labels* that are easily confused, and those that a user may not see are so written."""
    yield from describe_confusable(labels)
    if spaced := [repr(label) for label in labels if label != label.strip()]:
        yield (
            f"the names of these class folders begin or end with a space: {shorten(spaced)}; "
            "rename them, unless you want that"
        )


def is_pattern(classes_from: str) -> bool:
    """Tell whether *classes_from* is a regular expression for the names of files."""
    return classes_from not in ("", FOLDERS, SUBFOLDERS)


def class_in_name(path: bytes, pattern: str) -> str:
    """Return the text that *pattern* finds in the name of a file without suffix; "" if it finds none.

    Characters that are neither letters nor digits are removed from both ends: `cat` for `cat.1.jpg`.
    """
    name = normalize(os.fsdecode(path)).rpartition("/")[2]
    stem, _ = os.path.splitext(name)  # noqa: PTH122 - no `Path` for each image
    match = re.search(pattern, stem)
    return "" if match is None else re.sub(r"^[\W_]+|[\W_]+$", "", match.group())


def describe_class_problems(listing: ClassListing, labels: tuple[str, ...]) -> Iterator[str]:
    """Describe classes of *listing* that are not in *labels*, and empty folders.

    Labels without a folder are described only beside classes that are not in *labels*.
    """
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
            yield (
                f"{root}: the class {names} is {label!r} in the training images; "
                "rename one of them"
            )
            unknown = [folder for folder in unknown if folder not in alike]
        else:
            missing.append(label)

    # Names that are near to one that is missing: plurals, numbers and words that one part adds.
    for label in [*missing]:
        near = [folder for folder in unknown if _is_near(folder, label)]
        if len(near) == 1:
            yield f"{root / near[0]}: is it {label!r} of the training images? Rename one of them"
            unknown.remove(near[0])
            missing.remove(label)

    # Other unknown classes. Missing ones are told with them: these may be the same ones.
    if unknown:
        yield (
            f"{root}: classes {shorten(unknown)} are not training classes, remove "
            "them or train on them"
        )
    if missing and unknown:
        yield f"{root}: training classes {shorten(missing)} are missing, add them"

    # Class folders without images.
    used = set(images.targets.tolist())
    empty = [label for index, label in enumerate(images.labels) if index not in used]
    if empty:
        more = f" (also in {shorten(empty[1:])})" if len(empty) > 1 else ""
        ignored = describe_suffixes(count_suffixes(listing.other_files.get(empty[0], ())))
        only_others = f", only other files ({ignored})" if ignored else ""
        files = chain.from_iterable(listing.other_files.get(label, ()) for label in empty)
        advice = advise_on_files(root, [*files])
        if not advice:
            advice = f"add some ({describe_formats()}) or remove the folder"
        elif POINTER_ADVICE not in advice:
            advice = f"remove the folder, or {advice}"
        yield (
            f"{root / empty[0]}: no images in this class folder{more}{only_others}; {advice}"
        )


def _is_near(one: str, other: str) -> bool:
    """Tell whether two names of classes have the same words, except for plurals and words that one adds."""
    words, other_words = ({*_words(name)} for name in (one, other))
    return bool(words & other_words) and (words <= other_words or other_words <= words)


def _words(name: str) -> list[str]:
    """Return the words of *name* without numbers and endings, and without those of parts, as in `cat_train`."""
    words = [
        word for word in re.findall(r"[^\W\d_]+", lookalike_key(name)) if not part_kind(word)
    ]
    for pattern, ending in ENDINGS.items():
        words = [re.sub(pattern, ending, word) for word in words]
    return words


def no_classes_error(root: Path, part: Path | None = None, hint: str = "") -> DataError:
    """Build the error for *root*, or a *part* of it, in which nothing tells classes: what is there, what to do.

    That is the *hint*, if there is one.
    """
    where = root if part is None else part
    images, others = list_images(where)
    seen = _describe_entries([*map(os.fsdecode, images)], others)
    folders = {path.rpartition(b"/")[0] for path in images}
    in_training = {path for path in folders if part_kind(os.fsdecode(path)) in TRAINING}
    folders = in_training or folders
    unsorted = where / os.fsdecode(folders.pop()) if len(folders) == 1 else where
    advice = "put images into it, in one subfolder per class"
    if images:
        advice = (
            f"sort the images into one subfolder per class{suggest_sorting_by_hand(unsorted)}"
        )
    # Files of another format tell nothing about images that are there, but these do.
    packed = find_packed(where, images, others)
    advice = advise_on_files(where, packed if images else others) or advice
    return DataError(
        f"{where}: holds no class folders and no labels.csv ({seen}); {hint or advice}"
    )


def _describe_entries(images: Sequence[str], others: Sequence[str]) -> str:
    """Say what a folder holds, entry by entry: its folders with counts, and its files by suffix."""
    counts = Counter(f"{path.partition('/')[0]}/" if "/" in path else "" for path in images)
    seen = [
        f"{name} {amount(count, 'image')}".strip() for name, count in sorted(counts.items())
    ]
    if others:
        seen.append(f"other files: {describe_suffixes(count_suffixes(others))}")
    return shorten(seen) or "it is empty"


def suggest_sorting_by_hand(folder: Path) -> str:
    """Say how the images of *folder* can be sorted into classes."""
    return f", by hand or in a browser: sopdeploy label {quote(str(folder))} --photos sorted"
