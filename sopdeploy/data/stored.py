"""Pictures as image files in a store, each with its class."""

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.colours import match_transparency
from sopdeploy.data.store import Store
from sopdeploy.errors import DataError

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class StoredPictures:
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

    def only(self, mask: NDArray[np.bool_]) -> "StoredPictures":
        """Return the pictures that *mask* (N,) keeps."""
        return StoredPictures(self.store, self.labels, self.paths[mask], self.targets[mask])


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
