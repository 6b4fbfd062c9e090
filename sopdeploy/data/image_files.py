"""Labeled image files, and the detection of unreadable ones."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages, image_errors
from sopdeploy.environment import usable_cores
from sopdeploy.errors import DataError, shorten
from sopdeploy.files import open_regular
from sopdeploy.images.formats import load_pixels

CHUNK = 64  # images per task; decoding releases the GIL
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ImageFiles(LabeledImages):
    """Image files below `root`; `paths` is one array of bytes, which loader processes can share."""

    root: Path
    labels: tuple[str, ...]
    paths: NDArray[np.bytes_]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None

    def read(self, index: int) -> bytes:
        """Read the bytes of a file; raises `DataError` naming it."""
        path = self.path(index)
        try:
            with open_regular(path) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); repair or delete it") from error

    def identity(self, index: int) -> str:
        """Return the path of a file relative to `root`."""
        path: bytes = self.paths[index]
        return path.decode("utf-8", "surrogateescape")

    def describe(self, index: int) -> str:
        """Return the path of a file as text."""
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(self.paths[index])

    def select(self, mask: NDArray[np.bool_]) -> "ImageFiles":
        """Keep the images where *mask* (N,) is true."""
        groups = None if self.groups is None else self.groups[mask]
        return replace(self, paths=self.paths[mask], targets=self.targets[mask], groups=groups)


def map_threaded(function: Callable[[int], _Result], count: int) -> Iterator[_Result]:
    """Yield *function*(0) to *function*(count - 1) in order, computed by one thread per core."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for results in pool.map(lambda chunk: [function(index) for index in chunk], chunks):
            yield from results


def hash_images(images: LabeledImages) -> NDArray[np.int64]:
    """Hash the bytes of each of *images* to 64 bits, (N,); an unreadable image has the hash 0."""

    def hash_image(index: int) -> int:
        try:
            digest = hashlib.blake2b(images.read(index), digest_size=8).digest()
        except DataError:
            return 0
        return int.from_bytes(digest, "big", signed=True)

    return np.fromiter(map_threaded(hash_image, len(images)), dtype=np.int64, count=len(images))


def describe_contradictions(images: LabeledImages, hashes: NDArray[np.int64]) -> str:
    """Name the images with equal *hashes* (N,), those of `hash_images`, and different labels; "" if none."""
    _, indices, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    first = indices[inverse].tolist()  # for each image, the index of the first one with its hash
    same = images.targets[first] == images.targets
    same_labels = same if same.ndim == 1 else same.all(axis=1)
    readable = hashes != 0
    contradictions = np.flatnonzero(readable & ~same_labels).tolist()
    pairs = [f"{images.describe(first[index])} = {images.describe(index)}" for index in contradictions]
    return f"the same file has different labels; delete one of each: {shorten(pairs, '; ')}" if pairs else ""


def find_unreadable(images: LabeledImages) -> dict[int, str]:
    """Find the images that cannot be decoded; returns error messages by index.

    JPEGs are decoded at an eighth of their size, which still reads every byte.
    """

    def check(index: int) -> str:
        try:
            with image_errors(images.describe(index)):
                image = images.open(index)
                image.draft(None, (1, 1))
                load_pixels(image)
        except DataError as error:
            return str(error)
        return ""

    return {index: error for index, error in enumerate(map_threaded(check, len(images))) if error}


def unreadable_images_error(first: DataError, *parts: LabeledImages) -> DataError:
    """Build an error with every unreadable image of *parts*; return *first* if there is only one."""
    errors = [error for part in parts for error in find_unreadable(part).values()]
    if len(errors) < 2:
        return first
    return DataError(
        f"{len(errors)} images cannot be used (set data.skip_corrupt=true to leave them out, `sopdeploy data "
        f"check --json` lists them): {shorten(errors, '; ')}",
        lists={"images": errors},
    )
