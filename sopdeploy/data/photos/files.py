"""Files and folders below a folder of photos: which are listed, hidden, or images."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from sopdeploy.base.files import expand_user, holds_output
from sopdeploy.data.photos.kept import is_record
from sopdeploy.errors import DataError, shorten
from sopdeploy.images.signatures import count_suffixes, has_image_suffix, is_image, note_skipped
from sopdeploy.paths import describe_wrong, is_output

Log = Callable[[str], None]
ANY_IMAGES = "JPEG or PNG files, with or without subfolders"
FolderIdentity: TypeAlias = tuple[int, int] | str
# Written by macOS, Synology, QNAP, Windows, file systems and programs; they hold copies and thumbnails.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__", "node_modules",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Check whether programs ignore the file or folder *name*: hidden, or written by a file system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


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
        if is_folder(entry) and not holds_output(folder / entry.name)
    ]


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


def list_any_images(root: Path) -> list[bytes]:
    """List all images below *root*, relative to it and sorted, in whatever folders they are.

    Raises `DataError` if there are none, or for a name that is not UTF-8.
    """
    root = data_folder(root, ANY_IMAGES)
    with naming_all_undecodable(root):
        images, others = list_images(root)

    note_skipped(root, count_suffixes(others))
    if not images:
        raise DataError(f"{root}: holds no images; give a folder with {ANY_IMAGES}")
    return images


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

        if not is_folder(entry):
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


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether *entry* is a folder or a link to one; a link that leads to itself is not."""
    return entry.is_dir(follow_symlinks=False) or (
        entry.is_symlink() and os.path.isdir(entry.path)  # noqa: PTH112
    )
