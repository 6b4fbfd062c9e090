"""Labeled image files in a folder or archive."""

import io
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.data.folder_store import FolderStore
from sopdeploy.data.tar.store import TarStore
from sopdeploy.errors import DataError
from sopdeploy.images.color import match_transparency

FileStore = FolderStore | TarStore
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def count_ignored_files(store: FileStore, folders: Sequence[str]) -> dict[str, int]:
    """Count the files below *folders* without an image suffix, by suffix."""
    names = [name for folder in folders for name in store.list_files(folder)[1]]
    return dict(Counter(Path(name).suffix.lower() or "without an ending" for name in names).most_common())


def describe_ignored_files(counts: Mapping[str, int]) -> str:
    """Format the result of `count_ignored_files`, with advice for HEIC images."""
    listed = ", ".join(f"{suffix} {count}" for suffix, count in counts.items())
    return f"{listed}; convert .heic to JPEG first" if {".heic", ".heif"} & counts.keys() else listed


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
