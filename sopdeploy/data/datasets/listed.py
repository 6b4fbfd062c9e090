"""Open images that the text files of an official layout list; shared by the readers of the layouts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sopdeploy.data.datasets.folder import open_store
from sopdeploy.data.folder_store import FolderStore, OpenOptions, is_image
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import DataError

OFFICIAL = "use the official files"


def read_lines(path: Path) -> list[str]:
    """Read the lines of an official text file that are not blank; raises `DataError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason}); {OFFICIAL}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def find_folder(path: Path, places: Sequence[str], marker: str) -> Path | None:
    """Return the first of the folders *places*, relative to *path*, that contains the file *marker*."""
    return next((path / place for place in places if (path / place / marker).is_file()), None)


def list_images(
    folder: Path,
    listing: Path,
    labels: tuple[str, ...],
    entries: Sequence[tuple[str, int]],
    options: OpenOptions,
) -> ImageFiles:
    """Open images of *folder*; *entries* are the relative names and class indices in the file *listing*.

    Raises `DataError` for an index that is not one of *labels*, a class without images, a name that leaves
    the folder, or a file that does not exist.
    """
    for name, _ in entries:
        if not is_image(name) or ".." in Path(name).parts or Path(name).is_absolute():
            raise DataError(f"{listing}: {name!r} is not the name of an image in the folder; {OFFICIAL}")
    targets = np.asarray([target for _, target in entries], dtype=np.int64)
    if not len(targets) or targets.min() < 0 or targets.max() >= len(labels):
        raise DataError(f"{listing}: needs one class of {len(labels)} for each image; {OFFICIAL}")
    empty = np.flatnonzero(np.bincount(targets, minlength=len(labels)) == 0)
    if empty.size:
        raise DataError(f"{listing}: no images of the class {labels[empty[0]]}; {OFFICIAL}")
    store = open_store(folder, options)
    missing = [
        name for name, _ in entries if isinstance(store, FolderStore) and not (folder / name).is_file()
    ]
    if missing:
        more = f", and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise DataError(f"{folder / missing[0]}: does not exist{more}; unpack the official archive there")
    paths = np.asarray([name.encode() for name, _ in entries], dtype=np.bytes_)
    return ImageFiles(store, labels, paths, targets)
