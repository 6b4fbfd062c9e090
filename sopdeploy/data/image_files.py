"""Pictures as image files in a store, each with its class."""

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

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Say = Callable[[str], None]


class Store(Protocol):
    """Files below one point; an error names them by `where`."""

    @property
    def root(self) -> Path:
        """Return what an error calls the store."""

    def folders(self) -> list[str]:
        """Return the names of the visible folders, sorted."""

    def below(self, folder: str) -> "Store":
        """Return the store that one of the folders is."""

    def images(self, folder: str) -> list[bytes]:
        """Return the images of one folder and of those in it, sorted."""

    def others(self, folder: str) -> list[str]:
        """Return the names of the visible files there that are not called as images are."""

    def read(self, name: bytes) -> bytes:
        """Return the bytes of a file; raises `OSError`."""

    def size(self, name: bytes) -> int:
        """Return the number of bytes of a file; raises `OSError`."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How stores are opened: where to keep what is made of them, and whom to tell."""

    cache: Path | None = None
    say: Say = field(default=lambda _line: None)


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A folder of files; *enter* opens one of its folders."""

    root: Path
    enter: Callable[[Path], Store]

    def folders(self) -> list[str]:
        """Return the names of the visible folders, sorted; raises `DataError`."""
        return visible_folders(self.root)

    def below(self, folder: str) -> Store:
        """Return the store that one of the folders is."""
        return self.enter(self.root / folder)

    def images(self, folder: str) -> list[bytes]:
        """Return the images of one folder and of those in it, sorted."""
        return sorted(os.fsencode(path) for path in self.files(folder) if is_image(path.name))

    def others(self, folder: str) -> list[str]:
        """Return the names of the visible files there that are not called as images are."""
        return [str(path) for path in self.files(folder) if not is_image(path.name)]

    def files(self, folder: str) -> Iterator[Path]:
        """Yield the visible files of one folder and of those in it, relative to the store."""
        for path, folders, files in os.walk(self.root / folder):
            folders[:] = [name for name in folders if not is_hidden(name)]
            inside = Path(path).relative_to(self.root)
            yield from (inside / name for name in files if not is_hidden(name))

    def read(self, name: bytes) -> bytes:
        """Return the bytes of a file; raises `OSError`."""
        return (self.root / os.fsdecode(name)).read_bytes()

    def size(self, name: bytes) -> int:
        """Return the number of bytes of a file; raises `OSError`."""
        return (self.root / os.fsdecode(name)).stat().st_size


def passed_over(store: Store, folders: Sequence[str]) -> dict[str, int]:
    """Return how many files of *folders* are no pictures by their names: a count for each ending."""
    names = [name for folder in folders for name in store.others(folder)]
    return dict(Counter(Path(name).suffix.lower() or "without an ending" for name in names).most_common())


def describe_ignored_files(others: Mapping[str, int]) -> str:
    """Return what `passed_over` found as words, and what to do with the pictures of telephones."""
    listed = ", ".join(f"{ending} {count}" for ending, count in others.items())
    return f"{listed}; convert .heic to JPEG first" if {".heic", ".heif"} & others.keys() else listed


def visible_folders(root: Path) -> list[str]:
    """Return the names of the visible folders in *root*, sorted; raises `DataError`."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    except OSError as problem:
        raise DataError(
            f"{root}: cannot be listed ({problem.strerror}); give a folder you may read"
        ) from problem


def is_hidden(name: str) -> bool:
    """Say whether *name* is hidden, as `.ipynb_checkpoints` is."""
    return name.startswith(".")


def is_image(name: str) -> bool:
    """Say whether a visible file is called as images are."""
    return name.lower().endswith(ENDINGS) and not is_hidden(name)


UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files of `store`; `paths` is one array of bytes, which loader processes can share."""

    store: Store
    labels: tuple[str, ...]
    paths: NDArray[np.bytes_]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return loaded(self.header(index), self.where(index)), int(self.targets[index])

    def header(self, index: int) -> Image.Image:
        """Return a picture of which no pixel is decoded yet; raises `DataError` naming the file."""
        try:
            data = self.store.read(bytes(self.paths[index]))
        except OSError as problem:
            raise DataError(
                f"{self.where(index)}: cannot be read ({problem}); repair or delete it"
            ) from problem
        return opened(data, self.where(index))

    def path(self, index: int) -> Path:
        """Return where the file lies, or would lie if its archive were a folder."""
        return self.store.root / os.fsdecode(self.paths[index])

    def where(self, index: int) -> str:
        """Return what an error calls the file."""
        return str(self.path(index))

    def only(self, mask: NDArray[np.bool_]) -> "ImageFiles":
        """Return the pictures that *mask* (N,) keeps."""
        return ImageFiles(self.store, self.labels, self.paths[mask], self.targets[mask])


def opened(data: bytes, where: str) -> Image.Image:
    """Return the picture in *data*, its pixels still to be decoded; raises `DataError` naming *where*."""
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as problem:
        raise DataError(f"{where}: not an image; delete it or put the right file there") from problem
    except UNREADABLE as problem:
        raise DataError(f"{where}: cannot be read ({problem}); repair or delete it") from problem
    match_transparency(picture)
    return picture


def loaded(picture: Image.Image, where: str) -> Image.Image:
    """Return *picture* with its pixels; raises `DataError` naming *where*."""
    try:
        picture.load()
    except UNREADABLE as problem:
        raise DataError(f"{where}: cannot be read ({problem}); repair or delete it") from problem
    return picture
