"""Folders with images: which names are equal, hidden, images or parts of a data set, and what they hold.

File systems encode a letter such as `Ä` in two ways, which look the same and are the same name
(`normalize`). Names that differ only in case, spaces or variants of letters are different, but
easily confused (`lookalike_key`).

The folders of a data set that hold its training and its held-out images are recognized by their
names. Any case is accepted, and the usual affixes: `Training/`, `Val/`, `seg_train/seg_train/`,
`test_set/`.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sopdeploy.base.files import expand_user, has_manifest, holds_output
from sopdeploy.base.names import label_problem
from sopdeploy.data.photos.kept import is_record
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.images.signatures import has_image_suffix, is_image
from sopdeploy.paths import describe_wrong, is_output

Log = Callable[[str], None]
FolderIdentity: TypeAlias = tuple[int, int] | str
# Written by macOS, Synology, QNAP, Windows, file systems and programs; they hold copies and thumbnails.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__", "node_modules",
}  # fmt: skip
# Where the classes are, if each folder at the top is one, or each innermost folder
FOLDERS = "folders"
SUBFOLDERS = "subfolders"
LABELS_FILE = "labels.csv"
TRAIN = "train"
VAL = "val"
TRAINING = (TRAIN, "training")
# Best first
HELD_OUT = (
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
    "evaluation",
    "test",
    "testing",
)
AFFIXES = {"set", "seg", "data", "images", "photos", "split"}


def is_hidden(name: str) -> bool:
    """Check whether programs ignore the file or folder *name*: hidden, or written by a file system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_general(name: str) -> bool:
    """Tell whether the folder *name* says only that it holds images, such as `images` or `dataset`."""
    words = [word for word in re.split(r"[\s_.-]+", name.lower()) if word]
    stems = [word.removesuffix("s").removesuffix("set") for word in words]
    return bool(words) and all({stem, f"{stem}s"} & (AFFIXES | {"imgs", ""}) for stem in stems)


def part_kind(name: str) -> str:
    """Return *name* without affixes, `train` for `seg_train2`; "" if it is not in `TRAINING` or `HELD_OUT`."""
    kind, others = _read_part(name)
    return "" if others else kind


def _read_part(name: str) -> tuple[str, str]:
    """Divide *name* into its word in `TRAINING` or `HELD_OUT`, and its other words, joined.

    The first text is "" unless there is exactly one such word. `AFFIXES` and a number at the end
    are left out.
    """
    without_number = re.sub(r"\d+$", "", name.lower())  # of `test1` or `val_2017`
    words = [
        word for word in re.split(r"[\s_.-]+", without_number) if word and word not in AFFIXES
    ]
    stems = [word.removesuffix("set") for word in words]  # as in `trainset`
    kinds = [stem for stem in stems if stem in TRAINING or stem in HELD_OUT]
    others = [word for word, stem in zip(words, stems, strict=True) if stem not in kinds]
    return (kinds[0] if len(kinds) == 1 else ""), " ".join(others)


def part_kinds(names: Iterable[str]) -> dict[str, str]:
    """Return the kind of the part that each of the folders *names* is, or "".

    Other words may name the data set if a training part and a held-out one share them, as
    `cars_train` and `cars_test` do.
    """
    read = {name: _read_part(name) for name in names}
    trained = {others for kind, others in read.values() if kind in TRAINING}
    held_out = {others for kind, others in read.values() if kind in HELD_OUT}
    shared = {"", *(trained & held_out)}
    return {name: kind if others in shared else "" for name, (kind, others) in read.items()}


def normalize(name: str) -> str:
    """Return *name* in the encoding that all its spellings on file systems share (NFC)."""
    return unicodedata.normalize("NFC", name)


def lookalike_key(name: str) -> str:
    """Return what names share that are easily confused: *name* without case, variants and extra spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def hint_at_spelling(unknown: Collection[str], known: Collection[str]) -> str:
    """Describe confusable classes, *unknown* and *known*; "" without any, or if none is *unknown*."""
    lines = describe_confusable([*unknown, *known]) if unknown else []
    return f" ({'; '.join(lines)})" if lines else ""


def describe_confusable(names: Iterable[str]) -> list[str]:
    """Describe each set of *names* of classes that are easily confused."""
    alike = defaultdict[str, list[str]](list)
    for name in sorted(set(names)):
        alike[lookalike_key(name)].append(name)
    return [
        f"{' and '.join(map(repr, several))} are different classes; rename one if "
        "they are the same"
        for several in alike.values()
        if len(several) > 1
    ]


def check_labels(where: Path, labels: Sequence[str]) -> None:
    """Raise `DataError` for the first of *labels*, of images in *where*, that cannot name a class."""
    if problem := label_problem(labels):
        raise DataError(f"{where}: {problem}; rename the class")


class UndecodableNameError(DataError):
    """The name of a file is not UTF-8."""


@contextmanager
def naming_all_undecodable(root: Path) -> Iterator[None]:
    """Let the error of the first name below *root* that is not UTF-8 name all such files and folders."""
    try:
        yield
    except UndecodableNameError:
        names = [
            os.fsdecode(os.path.relpath(os.path.join(folder, name), os.fsencode(root)))  # noqa: PTH118
            for folder, folders, files in os.walk(os.fsencode(root))
            for name in (*folders, *files)
            if not _is_utf8(name)
        ]
        if len(names) < 2:
            raise
        raise DataError(
            f"{root}: {len(names)} names are not UTF-8, such as the names in a ZIP "
            "file of Windows; rename them: "
            f"{shorten([repr(name) for name in sorted(names)])}",
            lists={"names": sorted(names)},
        ) from None


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class Parts(NamedTuple):
    """Names of the subfolders of a data set.

    `train` holds the training images and is empty if there is no such folder. `held_out` is
    sorted as `HELD_OUT` is. `others` are all other subfolders.
    """

    train: str
    held_out: tuple[str, ...]
    others: tuple[str, ...]


def data_folder(path: Path, content: str = "one subfolder of images per class") -> Path:
    """Return *path* with `~` replaced; raise `DataError`, which names *content*, if it holds no photographs.

    It does not if it is not a folder, or one of bundles or runs.
    """
    folder = expand_user(path)
    if not folder.is_dir() or is_output(folder):
        advice = f"give a folder with {content}"
        raise DataError(f"{folder}: {describe_wrong(folder, 'photographs', advice)}")
    return folder


def list_subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of *folder*, sorted, except `list_outputs`; raises `DataError`."""
    return [
        entry.name
        for entry in list_folder(folder)
        if _is_folder(entry) and not holds_output(folder / entry.name)
    ]


def list_outputs(folder: Path) -> list[str]:
    """List the subfolders of *folder* that are bundles or runs, or hold some; raises `DataError`."""
    return [
        entry.name
        for entry in list_folder(folder)
        if _is_folder(entry) and holds_output(folder / entry.name)
    ]


def check_takes_output(folder: Path, setting: str | None, images: Path | None = None) -> None:
    """Raise `ConfigError` if *folder*, where bundles or runs are to be written, is a bundle or has photographs.

    It has photographs if it is the folder *images* or below it, or if it holds images or class
    folders of images. A folder that already holds bundles or runs is not searched for these.
    *setting* names *folder* unless it is an argument.
    """
    if has_manifest(folder):
        raise ConfigError(f"{folder} is a bundle; choose another folder", setting=setting)

    advice = "choose a folder outside of them"
    # `realpath`, because `resolve` raises an error for a link that leads to itself.
    real_folder = Path(os.path.realpath(folder))
    if images is not None and real_folder.is_relative_to(os.path.realpath(expand_user(images))):
        raise ConfigError(
            f"{folder} is inside the photos of {images}; {advice}", setting=setting
        )

    waiting = [folder] if folder.is_dir() and not holds_output(folder) else []
    while waiting:
        inner = waiting.pop()
        if holds_images(inner):
            raise ConfigError(f"{folder} holds photos; {advice}", setting=setting)
        # Search its class folders, and those in train/ and val/.
        if inner == folder or part_kind(inner.name):
            waiting += [inner / name for name in list_subfolders(inner)]


def holds_images(folder: Path) -> bool:
    """Tell whether *folder* itself holds a visible image; raises `DataError`."""
    return any(
        entry.is_file() and is_image(folder / entry.name) for entry in list_folder(folder)
    )


def holds_other_files(root: Path, name: str) -> bool:
    """Tell whether the folder *name* in *root* holds files, and no images; raises `DataError`."""
    images, others = list_images(root, name)
    return bool(others) and not images


def list_images(
    root: Path, folder: str = "", visited: set[FolderIdentity] | None = None
) -> tuple[list[bytes], list[str]]:
    """List the images below the subfolder *folder* of *root*, sorted, and the other files below it.

    All paths are relative to *root*. Those of images are bytes, as `ImageFiles` has them in an
    array; the others are text for messages. A copy that a program left beside an image is one
    of the others (`_is_copy_beside`). The record of a kept photo, which moves with it, is none of
    them. Folders in *visited* are left out, and those that are listed are added to it (`walk`).
    Raises `DataError` for a folder that cannot be listed.
    """
    images = set[str]()
    unsuffixed = list[str]()
    others = list[str]()

    for path in walk(root / folder, visited):
        relative = str(path.relative_to(root))
        if is_record(path.name):
            continue
        if not is_image(path):
            others.append(relative)
        elif has_image_suffix(path.name):
            images.add(relative)
        else:
            unsuffixed.append(relative)

    # A copy beside an image has its name with another ending.
    for name in unsuffixed:
        if _is_copy_beside(name, images):
            others.append(name)
        else:
            images.add(name)

    return sorted(map(os.fsencode, images)), sorted(others)


def _is_copy_beside(name: str, images: Collection[str]) -> bool:
    """Tell whether the file *name* adds to that of one of the *images*, as `1.jpg~` and `1.jpg.bak` do."""
    return any(name[:end] in images for end in range(len(name) - 1, name.rfind("/") + 1, -1))


def walk(
    folder: Path, visited: set[FolderIdentity] | None = None, *, hidden: bool = False
) -> Iterator[Path]:
    """Yield the files below *folder*, sorted by name in each folder; with *hidden*, also hidden ones.

    Links to folders are followed. Each real folder is listed once, and added to *visited*: under
    its own path if it is below *folder*, otherwise under the first link. Not listed are

    - folders in *visited*, and those that contain *folder*,
    - without *hidden*, bundles and runs, some of which hold images.

    The time is linear in the number of entries. Raises `DataError` for a folder that cannot be
    listed.
    """
    visited = set() if visited is None else visited

    # Each folder on the way has the iterator of its entries.
    root = folder.resolve()
    visited.update(folder_identity(parent) for parent in (folder, *root.parents))
    waiting = [(folder, iter(list_folder(folder, hidden=hidden)))]  # the innermost folder last

    while waiting:
        parent, entries = waiting[-1]
        entry = next(entries, None)

        if entry is None:
            waiting.pop()
            continue
        path = parent / entry.name

        if not _is_folder(entry):
            yield path
            continue

        if entry.is_symlink():
            real = path.resolve()
            if real.is_relative_to(root):
                has_own_path = hidden or not any(map(is_hidden, real.relative_to(root).parts))
                if has_own_path:  # the folder is listed under it
                    continue

        if not hidden and holds_output(path):
            continue
        identity = folder_identity(path)
        if identity not in visited:
            visited.add(identity)
            waiting.append((path, iter(list_folder(path, hidden=hidden))))


def folder_identity(folder: Path) -> FolderIdentity:
    """Return what all paths of a real folder share: device and inode, or its real path without an inode."""
    try:
        status = folder.stat()
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def list_folder(folder: Path, *, hidden: bool = False) -> list[os.DirEntry[str]]:
    """List the content of *folder*, sorted by name; what is hidden only with *hidden*.

    Raises `DataError` if it cannot be listed or, without *hidden*, if a name is not UTF-8.
    """
    try:
        with os.scandir(folder) as scanned:
            entries = [entry for entry in scanned if hidden or not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    if not hidden:  # the names will be shown; with hidden ones, they are only compared
        for entry in entries:
            if not _is_utf8(os.fsencode(entry.name)):
                raise UndecodableNameError(
                    f"{folder}: the name {entry.name!r} is not UTF-8; rename it"
                )
    return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether *entry* is a folder or a link to one; a link that leads to itself is not."""
    return entry.is_dir(follow_symlinks=False) or (
        entry.is_symlink() and os.path.isdir(entry.path)  # noqa: PTH112
    )


def find_parts(root: Path, names: Sequence[str]) -> Parts:
    """Find the parts of the data set in *root* among the folders *names* in it.

    Raises `DataError` for two folders of training images.
    """
    kinds = part_kinds(names)

    # The training part contains folders. One without any may be a class, beside a folder that
    # may be another one.
    candidates = [name for name in names if kinds[name] in TRAINING]
    flat = [name for name in candidates if not list_subfolders(root / name)]
    if flat and any(not kinds[name] and not holds_other_files(root, name) for name in names):
        candidates = [name for name in candidates if name not in flat]
    if len(candidates) > 1:
        candidates = [name for name in candidates if not holds_other_files(root, name)]
    if len(candidates) > 1:
        raise DataError(
            f"{root}: {shorten(candidates)} may all hold the training images; "
            "rename all but one"
        )

    # The held-out parts, in the order of `HELD_OUT`.
    held_out = [name for name in names if kinds[name] in HELD_OUT]
    held_out.sort(key=lambda name: HELD_OUT.index(kinds[name]))
    train = candidates[0] if candidates else ""
    others = tuple(name for name in names if name not in (train, *held_out))
    return Parts(train, tuple(held_out), others)


def split_names(leave_out: str, root: Path) -> tuple[str, ...]:
    """Divide *leave_out*, names of folders in *root* separated by commas.

    Commas in a name, and spaces around it, are part of it if *root* has such a folder.
    """
    names = list[str]()
    pieces = leave_out.split(",")
    while pieces:
        # As many pieces as make the name of a folder, or one. `Path.is_dir` raises for a text that is
        # longer than a name can be.
        count = len(pieces)
        while count > 1 and not os.path.isdir(root / ",".join(pieces[:count])):  # noqa: PTH112
            count -= 1
        name = ",".join(pieces[:count])
        names.append(name if os.path.isdir(root / name) else name.strip())  # noqa: PTH112
        pieces = pieces[count:]
    return tuple(name for name in names if name.strip())


def part_folder(root: Path, name: str) -> Path:
    """Return the folder of the part *name* in *root*; for `seg_train/seg_train/`, the innermost one.

    A single folder that says only that it holds images, as in `Training/Images/`, is the part, too.
    """
    folder = root / name
    kind, others = _read_part(name)
    same_part = {(kind, others), (kind, "")}
    while True:
        inner = list_subfolders(folder)
        if len(inner) != 1:
            return folder
        if _read_part(inner[0]) not in same_part and not is_general(inner[0]):
            return folder
        folder /= inner[0]
