"""Labeled image files, and the detection of unreadable ones."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.data.base import LabeledImages, Target, hold_out
from sopdeploy.environment import usable_cores
from sopdeploy.errors import DataError, ImageError, shorten
from sopdeploy.files import open_regular
from sopdeploy.images.formats import load_pixels, open_image

CHUNK = 64  # images per task; decoding releases the GIL
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files below `root`; `paths` is one array of bytes, which loader processes can share.

    `targets` are class indices (N,), or (N, C) with 1 for every class of an image. Images with equal `groups`
    (N,) show one object or one burst; `None` if no groups are known.
    """

    root: Path
    labels: tuple[str, ...]
    paths: NDArray[np.bytes_]
    targets: NDArray[np.int64] | NDArray[np.float32]
    groups: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        target = self.target(index)
        with image_errors(self.path(index)):
            return load_pixels(open_image(self.read(index))), target

    def target(self, index: int) -> Target:
        """Return the class index of an image, or its row (C,) of several classes."""
        target: Any = self.targets[index]
        return int(target) if self.targets.ndim == 1 else target

    def class_names(self, index: int) -> list[str]:
        """List the classes of an image."""
        if self.targets.ndim == 1:
            return [self.labels[int(self.targets[index])]]
        return [self.labels[column] for column in np.flatnonzero(self.targets[index])]

    def class_counts(self) -> NDArray[np.int64]:
        """Count the images of each class, (C,)."""
        if self.targets.ndim == 1:
            return np.bincount(self.targets.astype(np.int64), minlength=len(self.labels))
        counts: NDArray[np.int64] = np.count_nonzero(self.targets, axis=0)
        return counts

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding its pixels; raises `DataError` naming the file."""
        with image_errors(self.path(index)):
            return open_image(self.read(index))

    def read(self, index: int) -> bytes:
        """Read the bytes of a file; raises `DataError` naming it."""
        path = self.path(index)
        try:
            with open_regular(path) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); repair or delete it") from error

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(self.paths[index])

    def select(self, mask: NDArray[np.bool_]) -> "ImageFiles":
        """Keep the images where *mask* (N,) is true."""
        groups = None if self.groups is None else self.groups[mask]
        return replace(self, paths=self.paths[mask], targets=self.targets[mask], groups=groups)


def join(first: ImageFiles, second: ImageFiles) -> ImageFiles:
    """Join two selections of the same images, sorted by path."""
    paths = np.concatenate([first.paths, second.paths])
    by_path = np.argsort(paths, kind="stable")
    targets = np.concatenate([first.targets, second.targets])
    groups = None
    if first.groups is not None and second.groups is not None:
        groups = np.concatenate([first.groups, second.groups])[by_path]
    return replace(first, paths=paths[by_path], targets=targets[by_path], groups=groups)


def divide(images: ImageFiles, fraction: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
    """Split *images* into training and held-out ones, *fraction* of the groups of every class by *seed*.

    A class whose images form one group is not held out. Raises `DataError` for a class with a single image.
    """
    single = np.flatnonzero(images.class_counts() == 1)
    if single.size:
        name = images.labels[single[0]]
        raise DataError(f"{images.root}: only one image of {name}; add another, one has to be held out")
    keys = [path.decode("utf-8", "surrogateescape") for path in images.paths.tolist()]
    groups = np.arange(len(keys)) if images.groups is None else images.groups
    # Of G groups, the first image stands for the others; N is the number of images.
    _, first_G, group_N = np.unique(groups, return_index=True, return_inverse=True)
    held_out_G = hold_out([keys[index] for index in first_G], images.targets[first_G], fraction, seed)
    mask = held_out_G[group_N]
    return images.select(~mask), images.select(mask)


@contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """Convert an `ImageError` to a `DataError` naming *path*."""
    try:
        yield
    except ImageError as error:
        raise DataError(f"{path}: {error}; repair, convert or delete it") from error


def map_threaded(function: Callable[[int], _Result], count: int) -> Iterator[_Result]:
    """Yield *function*(0) to *function*(count - 1) in order, computed by one thread per core."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for results in pool.map(lambda chunk: [function(index) for index in chunk], chunks):
            yield from results


def hash_images(images: LabeledImages) -> NDArray[np.int64]:
    """Hash the bytes of each file of *images* to 64 bits, (N,); empty for images that are not files.

    An unreadable file has the hash 0.
    """
    if not isinstance(images, ImageFiles):
        return np.zeros(0, dtype=np.int64)

    def hash_file(index: int) -> int:
        try:
            digest = hashlib.blake2b(images.read(index), digest_size=8).digest()
        except DataError:
            return 0
        return int.from_bytes(digest, "big", signed=True)

    return np.fromiter(map_threaded(hash_file, len(images)), dtype=np.int64, count=len(images))


def describe_contradictions(images: LabeledImages, hashes: NDArray[np.int64]) -> str:
    """Name the files with equal *hashes* (N,), those of `hash_images`, and different labels; "" if none."""
    if not isinstance(images, ImageFiles):
        return ""
    _, indices, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    first = indices[inverse].tolist()  # for each file, the index of the first one with its hash
    same = images.targets[first] == images.targets
    same_labels = same if same.ndim == 1 else same.all(axis=1)
    readable = hashes != 0
    contradictions = np.flatnonzero(readable & ~same_labels).tolist()
    pairs = [f"{images.path(first[index])} = {images.path(index)}" for index in contradictions]
    return f"the same file has different labels; delete one of each: {shorten(pairs, '; ')}" if pairs else ""


def find_unreadable(images: ImageFiles) -> dict[int, str]:
    """Find the images that cannot be decoded; returns error messages by index.

    JPEGs are decoded at an eighth of their size, which still reads every byte.
    """

    def check(index: int) -> str:
        try:
            with image_errors(images.path(index)):
                image = open_image(images.read(index))
                image.draft(None, (1, 1))
                load_pixels(image)
        except DataError as error:
            return str(error)
        return ""

    return {index: error for index, error in enumerate(map_threaded(check, len(images))) if error}


def unreadable_images_error(first: DataError, *parts: LabeledImages) -> DataError:
    """Build an error with every unreadable image of *parts*; return *first* if there is only one."""
    errors = [
        error for part in parts if isinstance(part, ImageFiles) for error in find_unreadable(part).values()
    ]
    if len(errors) < 2:
        return first
    return DataError(
        f"{len(errors)} images cannot be used (set data.skip_corrupt=true to leave them out, `sopdeploy data "
        f"check --json` lists them): {shorten(errors, '; ')}",
        lists={"images": errors},
    )
