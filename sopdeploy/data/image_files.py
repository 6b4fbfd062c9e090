"""Labeled image files in a folder or archive."""

import io
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.errors import DataError
from sopdeploy.images.color import match_transparency

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
Log = Callable[[str], None]


class FileStore(Protocol):
    """Read access to the files of a folder or archive; hidden files are ignored."""

    @property
    def root(self) -> Path:
        """Path of the folder or archive, for error messages."""

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted."""

    def open_folder(self, folder: str) -> "FileStore":
        """Open a subfolder as a store."""

    def images(self, folder: str) -> list[bytes]:
        """List the images below a subfolder, relative to the store, sorted."""

    def other_files(self, folder: str) -> list[str]:
        """List the files below a subfolder that have no image suffix."""

    def read(self, name: bytes) -> bytes:
        """Read a file; raises `OSError`."""

    def size(self, name: bytes) -> int:
        """Get the size of a file in bytes; raises `OSError`."""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for opening data: the cache folder for archives, and a function for log messages."""

    cache: Path | None = None
    log: Log = field(default=lambda _line: None)


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A folder on disk; *open_path* opens a subfolder, which may hold archives."""

    root: Path
    open_path: Callable[[Path], FileStore]

    def folders(self) -> list[str]:
        """List the names of the subfolders, sorted; raises `DataError`."""
        return visible_folders(self.root)

    def open_folder(self, folder: str) -> FileStore:
        """Open a subfolder as a store."""
        return self.open_path(self.root / folder)

    def images(self, folder: str) -> list[bytes]:
        """List the images below a subfolder, relative to the store, sorted."""
        return sorted(os.fsencode(path) for path in self._files(folder) if is_image(path.name))

    def other_files(self, folder: str) -> list[str]:
        """List the files below a subfolder that have no image suffix."""
        return [str(path) for path in self._files(folder) if not is_image(path.name)]

    def read(self, name: bytes) -> bytes:
        """Read a file; raises `OSError`."""
        return (self.root / os.fsdecode(name)).read_bytes()

    def size(self, name: bytes) -> int:
        """Get the size of a file in bytes; raises `OSError`."""
        return (self.root / os.fsdecode(name)).stat().st_size

    def _files(self, folder: str) -> Iterator[Path]:
        for path, folders, files in os.walk(self.root / folder):
            folders[:] = [name for name in folders if not is_hidden(name)]
            inside = Path(path).relative_to(self.root)
            yield from (inside / name for name in files if not is_hidden(name))


def count_ignored_files(store: FileStore, folders: Sequence[str]) -> dict[str, int]:
    """Count the files below *folders* without an image suffix, by suffix."""
    names = [name for folder in folders for name in store.other_files(folder)]
    return dict(Counter(Path(name).suffix.lower() or "without an ending" for name in names).most_common())


def describe_ignored_files(counts: Mapping[str, int]) -> str:
    """Format the result of `count_ignored_files`, with advice for HEIC images."""
    listed = ", ".join(f"{suffix} {count}" for suffix, count in counts.items())
    return f"{listed}; convert .heic to JPEG first" if {".heic", ".heif"} & counts.keys() else listed


def visible_folders(root: Path) -> list[str]:
    """List the names of the visible folders in *root*, sorted; raises `DataError`."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{root}: cannot be listed ({error.strerror}); check its permissions") from error


def is_hidden(name: str) -> bool:
    """Check whether the file or folder *name* is hidden, such as `.ipynb_checkpoints`."""
    return name.startswith(".")


def is_image(name: str) -> bool:
    """Check whether the file *name* is visible and has an image suffix."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files of a store; `paths` is one array of bytes, which loader processes can share."""

    store: FileStore
    labels: tuple[str, ...]
    paths: NDArray[np.bytes_]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_pixels(self.open(index), self.path(index)), int(self.targets[index])

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding its pixels; raises `DataError` naming the file."""
        try:
            data = self.store.read(bytes(self.paths[index]))
        except OSError as error:
            raise DataError(f"{self.path(index)}: cannot be read ({error}); repair or delete it") from error
        return open_image(data, self.path(index))

    def path(self, index: int) -> Path:
        """Path of a file; inside an archive, the path as if the archive were a folder."""
        return self.store.root / os.fsdecode(self.paths[index])

    def select(self, mask: NDArray[np.bool_]) -> "ImageFiles":
        """Keep the images where *mask* (N,) is true."""
        return ImageFiles(self.store, self.labels, self.paths[mask], self.targets[mask])


def open_image(data: bytes, path: Path) -> Image.Image:
    """Open the encoded image *data* without decoding its pixels; raises `DataError` naming *path*."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image; delete or replace it") from error
    except DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error}); repair or delete it") from error
    match_transparency(image)
    return image


def load_pixels(image: Image.Image, path: Path) -> Image.Image:
    """Decode the pixels of *image* in place and return it; raises `DataError` naming *path*."""
    try:
        image.load()
    except DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error}); repair or delete it") from error
    return image
