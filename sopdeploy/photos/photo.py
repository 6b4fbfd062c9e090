"""Labeled photographs: their bytes, targets and identities, their parts, and the arrays that networks see.

Letters: N images, B images of a batch, C classes.
"""

import copy
import hashlib
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.environment import usable_cores
from sopdeploy.errors import DataError, ImageError, amount, shorten, shorten_problems
from sopdeploy.files import read_file
from sopdeploy.images.decode import decode, decode_upright
from sopdeploy.images.formats import open_image
from sopdeploy.images.limits import MAX_BYTES
from sopdeploy.images.metadata import capture_time
from sopdeploy.images.pixels import ChooseView, preprocess_image
from sopdeploy.images.preprocess import Pixels, Preprocess
from sopdeploy.images.signatures import HEAD_BYTES, format_of, read_head
from sopdeploy.names import label_problem
from sopdeploy.photos.files import normalize

UNREADABLE = 0  # the hash of a file that cannot be read
# A run leaves damaged images out, up to this share and fewer than this number of them.
MAX_DAMAGED = 0.05
MANY_DAMAGED = 3
# Bytes of the pixels of a data set: 174,000 images of 32 x 32, or 3,500 of 224 x 224
MAX_IN_MEMORY = 2**29
CHUNK = 64  # images per task of a thread; decoding releases the GIL
# How much of a photograph is decoded to compare it, or to show it
SHOWN = Preprocess(decoding="scaled")
SMALLEST = Preprocess(decoding="scaled", resize=1, crop=1)  # still reads every byte
_Result = TypeVar("_Result")
_Images = TypeVar("_Images", bound="LabeledImages")


class Photo:
    """A photograph that is read once: its bytes, and what follows from them, computed when it is needed.

    Messages call it *name*. What needs a header or pixels raises `DataError` if they are
    damaged.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.content = content

    @cached_property
    def file_hash(self) -> int:
        """The identity of the file: a hash of its bytes, 64 bits in the range of int64."""
        return int.from_bytes(
            hashlib.blake2b(self.content, digest_size=8).digest(), "big", signed=True
        )

    @cached_property
    def image(self) -> Image.Image:
        """The image; only its header is read. Raises `DataError` if the file is no image."""
        with image_errors(self.name):
            return open_image(self.content)

    @cached_property
    def taken(self) -> int:
        """When the photograph was taken, in seconds of the camera's clock, or `NO_TIME`."""
        return capture_time(self.image)

    @cached_property
    def pixels(self) -> Image.Image:
        """The upright RGB pixels, of a large JPEG at a smaller scale; raises `DataError` if damaged."""
        with image_errors(self.name):
            return decode_upright(self.content, SHOWN)

    def preprocess(self, rules: Preprocess, choose_view: ChooseView | None = None) -> Pixels:
        """Compute the pixels (crop, crop, 3) that a network with *rules* reads, as the service does.

        With *choose_view*, these are the pixels of its view. Raises `DataError` if the image is
        damaged.
        """
        with image_errors(self.name):
            return decode(self.content, rules, choose_view=choose_view).pixels

    @cached_property
    def pixel_hash(self) -> str:
        """The identity of `pixels`: equal for files of a format that show the same ones."""
        return hashlib.blake2b(
            f"{self.image.size} {self.pixels.size} ".encode() + self.pixels.tobytes(),
            digest_size=16,
        ).hexdigest()

    def check(self) -> None:
        """Raise `DataError` if the file cannot be decoded; a JPEG is decoded at 1/8 of its size."""
        self.preprocess(SMALLEST)


class LabeledImages(ABC):
    """Base class of the images of a data source: images of any size and mode with their targets.

    Attributes:
        labels: Class names in output order.
        targets: Class indices (N,) int64, or (N, C) float32 with 1 for every class of an image.
        groups: Images with equal values (N,) show one object or one burst and are never divided; None if no
            groups are known.
        PER_IMAGE: Names of the attributes (N, ...) of which `select` keeps a part.
    """

    labels: tuple[str, ...]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None
    PER_IMAGE: ClassVar[tuple[str, ...]] = ("targets", "groups")

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read an encoded image, such as the bytes of a JPEG; raises `DataError` naming it."""

    def read_head(self, index: int) -> bytes:
        """Read the first bytes of an encoded image; nothing of one that is unreadable or no file."""
        try:
            return self.read(index)[:HEAD_BYTES]
        except DataError:
            return b""

    @abstractmethod
    def identity(self, index: int) -> str:
        """Return a name that no other image has and that is the same on every machine.

        With the seed, the names determine which images are held out. Reports show them.
        """

    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true."""
        arrays = {name: getattr(self, name) for name in self.PER_IMAGE}
        return self.replaced(
            **{name: array[mask] for name, array in arrays.items() if array is not None}
        )

    def describe(self, index: int) -> str:
        """Return what messages call an image: its identity, or the path of its file."""
        return self.identity(index)

    def photo(self, index: int) -> Photo:
        """Read a photograph; raises `DataError` naming it."""
        return Photo(self.describe(index), self.read(index))

    def preprocess(
        self, index: int, rules: Preprocess, choose_view: ChooseView | None = None
    ) -> Pixels:
        """Compute the pixels of an image as `Photo.preprocess` does; raises `DataError` naming it."""
        return self.photo(index).preprocess(rules, choose_view)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image can have any number of classes."""
        return self.targets.ndim == 2

    def __len__(self) -> int:
        return len(self.targets)

    def class_names(self, index: int) -> list[str]:
        """List the classes of an image."""
        if self.is_multi_label:
            return [self.labels[column] for column in np.flatnonzero(self.targets[index])]
        return [self.labels[int(self.targets[index])]]

    def class_counts(self) -> NDArray[np.int64]:
        """Count the images of each class, (C,)."""
        if self.is_multi_label:
            return np.count_nonzero(self.targets, axis=0)
        return np.bincount(self.targets.astype(np.int64), minlength=len(self.labels))

    def replaced(self, **attributes: Any) -> Self:
        """Copy the images with other *attributes*."""
        other = copy.copy(self)
        for name, value in attributes.items():
            object.__setattr__(other, name, value)  # also if the class is a frozen dataclass
        return other


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Convert the `ImageError` of the image that messages call *name* to a `DataError`."""
    try:
        yield
    except ImageError as error:
        # That of a format names its own cure.
        is_format = error.code == "unsupported_format"
        cure = "" if is_format else "; repair, convert or delete it"
        raise DataError(f"{name}: {error}{cure}") from error


@dataclass(frozen=True, slots=True)
class ArrayImages(LabeledImages):
    """Images in memory: (N, H, W) gray or (N, H, W, 3) RGB, uint8."""

    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None
    PER_IMAGE: ClassVar = ("images", *LabeledImages.PER_IMAGE)

    def read(self, index: int) -> bytes:
        """Encode an image as BMP, which loses no pixel."""
        file = BytesIO()
        Image.fromarray(self.images[index]).save(file, "BMP")
        return file.getvalue()

    def read_head(self, index: int) -> bytes:  # noqa: ARG002
        """Return nothing: pixels in memory are no file."""
        return b""

    def identity(self, index: int) -> str:
        """Return the position of an image."""
        return str(index)

    def preprocess(
        self, index: int, rules: Preprocess, choose_view: ChooseView | None = None
    ) -> Pixels:
        """Compute the pixels of an image as `Photo.preprocess` does, without encoding it first."""
        image = Image.fromarray(self.images[index])
        return preprocess_image(image, rules, choose_view and choose_view(image.size))


@dataclass(frozen=True, slots=True)
class ImageFiles(LabeledImages):
    """Image files below `root`; `paths` is one array of bytes, which loader processes can share."""

    root: Path
    labels: tuple[str, ...]
    paths: NDArray[np.bytes_]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None
    PER_IMAGE: ClassVar = ("paths", *LabeledImages.PER_IMAGE)

    def read(self, index: int) -> bytes:
        """Read the bytes of a file; raises `DataError` naming it."""
        path = self.path(index)
        try:
            return read_file(path, MAX_BYTES)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no longer there; put it back") from error
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); repair or delete it"
            ) from error

    def read_head(self, index: int) -> bytes:
        """Read the first bytes of a file; nothing of one that cannot be read."""
        return read_head(self.path(index))

    def identity(self, index: int) -> str:
        """Return the path of a file relative to `root`, in the encoding that all machines share."""
        return normalize(os.fsdecode(self.paths[index]))

    def describe(self, index: int) -> str:
        """Return the path of a file as text."""
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(self.paths[index])


class LeftOut(NamedTuple):
    """An unusable image that a run leaves out: its part ("train" or "held_out"), identity, and the reason."""

    part: str
    identity: str
    reason: str

    def __str__(self) -> str:
        return f"{self.identity}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Training and held-out images with the same labels.

    `held_out` is empty if the source has no such images. The procedure that trains then decides
    whether it holds out some of the training images (`choose_held_out`). `notes` are lines
    about what the user may not have intended, such as files and folders that are not used.
    `left_out` are the unusable images that are no longer in the parts.
    """

    train: LabeledImages
    held_out: LabeledImages
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        # Data sources that plug-ins register can have any labels.
        if problem := label_problem(self.train.labels):
            raise DataError(f"{problem}; rename the class")

    def without(self, left_out: Sequence[LeftOut]) -> "Split":
        """Leave the images *left_out* out, and record them."""
        if not left_out:
            return self
        parts: dict[str, LabeledImages] = {"train": self.train, "held_out": self.held_out}
        for name, images in parts.items():
            identities = {one.identity for one in left_out if one.part == name}
            kept = [images.identity(index) not in identities for index in range(len(images))]
            parts[name] = images.select(np.asarray(kept, np.bool_))
        return replace(
            self, train=parts["train"], held_out=parts["held_out"], left_out=tuple(left_out)
        )

    @classmethod
    def undivided(cls, images: LabeledImages, notes: Sequence[str] = ()) -> "Split":
        """Create a split without held-out images."""
        return cls(
            train=images,
            held_out=images.select(np.zeros(len(images), np.bool_)),
            notes=tuple(notes),
        )


@dataclass(frozen=True, slots=True)
class Dataset(ABC):
    """Base class of network inputs: the `images` of a source, converted to uint8 arrays of one size."""

    images: LabeledImages

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Compute the pixels (B, H, W, 3) of the images at *indices*, and what else belongs to them."""


class FittedPixels:
    """The pixels (N, crop, crop, 3) of *images* by *rules*; not kept if they exceed `MAX_IN_MEMORY`.

    The memory is anonymous and shared: forked loader processes fill and read the same pages,
    without the small /dev/shm of containers. Two processes may compute the same image; they
    write the same bytes.
    """

    def __init__(self, images: LabeledImages, rules: Preprocess) -> None:
        self.images = images
        self.rules = rules
        shape = (len(images), rules.crop, rules.crop, 3)
        self.is_kept = 0 < math.prod(shape) <= MAX_IN_MEMORY
        kept_shape = shape if self.is_kept else (0, 0, 0, 3)
        self.pixels = shared_zeros(kept_shape)
        self.is_computed = shared_zeros(kept_shape[:1])
        self.rows = np.arange(len(images))  # the row of `pixels` of each image

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the images without their pixels."""
        return type(self), (self.images, self.rules)

    def read(self, samples: Sequence[int]) -> Pixels:
        """Return the pixels (B, crop, crop, 3) of the images at the indices *samples*.

        If pixels are kept, they are computed at their first use only. Raises `DataError` for a
        damaged image.
        """
        if not self.is_kept:
            return np.stack([self.images.preprocess(sample, self.rules) for sample in samples])
        rows = self.rows[np.asarray(samples)]
        missing = {
            samples[position]
            for position in np.flatnonzero(self.is_computed[rows] == 0).tolist()
        }
        for sample in sorted(missing):
            self.pixels[self.rows[sample]] = self.images.preprocess(sample, self.rules)
        self.is_computed[rows] = 1  # after the pixels, which other processes read then
        pixels: Pixels = self.pixels[rows]
        return pixels

    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true; both objects share their pixels."""
        selected = copy.copy(self)
        selected.images = self.images.select(mask)
        selected.rows = self.rows[mask]
        return selected


def shared_zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Create an array of zeros that this process and those that it forks share; pages exist when used."""
    memory = mmap.mmap(-1, max(1, math.prod(shape)))
    return np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)


@dataclass(frozen=True, slots=True)
class FittedDataset(Dataset):
    """Base class of inputs whose images are fitted to the network; index `sample + copy * N` is a copy.

    `fitted` are the pixels that stay in memory, if there are any.
    """

    fitted: FittedPixels | None = field(default=None, kw_only=True)

    @abstractmethod
    def pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Compute the pixels (B, H, W, 3) of the images at *indices*, which may be those of copies."""

    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Compute the pixels (B, H, W, 3) and the targets, (B,) int64 or (B, C), of images or copies."""
        targets = self.images.targets[np.asarray(indices) % len(self.images)]
        return self.pixels(indices), targets if self.images.is_multi_label else targets.astype(
            np.int64
        )

    def fit(self, indices: Sequence[int], rules: Preprocess) -> NDArray[np.uint8]:
        """Return images at *indices* fitted by *rules*, (B, crop, crop, 3), or the `fitted` ones."""
        if self.fitted is not None:
            return self.fitted.read(indices)
        return np.stack([self.images.preprocess(index, rules) for index in indices])

    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true."""
        fitted = None if self.fitted is None else self.fitted.select(mask)
        return replace(self, images=self.images.select(mask), fitted=fitted)


@dataclass(frozen=True, slots=True)
class PreprocessedDataset(FittedDataset):
    """Images preprocessed exactly as the service does, for evaluation.

    With `pad`, they are padded with that many black pixels and cropped at an offset that the
    pixels decide.
    """

    preprocess: Preprocess
    pad: int = 0

    def pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Compute the pixels (B, crop, crop, 3) at *indices*, shifted by `pad` at most."""
        arrays = self.fit(indices, self.preprocess)
        pad = self.pad
        if not pad:
            return arrays
        windows = []
        for array in arrays:  # the offset is the same in every epoch
            digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
            top, left = (
                int.from_bytes(half, "big") % (2 * pad + 1) for half in (digest[:8], digest[8:])
            )
            windows.append(Window(top, left))
        return crop_padded(arrays, pad, windows)


class Window(NamedTuple):
    """Where a padded image is cropped, in pixels, and whether the result is mirrored."""

    top: int
    left: int
    is_mirrored: bool = False


def crop_padded(
    arrays: NDArray[np.uint8], pad: int, windows: Sequence[Window]
) -> NDArray[np.uint8]:
    """Pad *arrays* (B, H, W, 3) with *pad* black pixels and crop each to (H, W) at its window.

    A window may mirror what it shows.
    """
    count, height, width, channels = arrays.shape
    padded = np.zeros((count, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = arrays
    cropped = np.empty_like(arrays)
    for array, result, (top, left, is_mirrored) in zip(padded, cropped, windows, strict=True):
        window = array[top : top + height, left : left + width]
        result[:] = window[:, ::-1] if is_mirrored else window
    return cropped


def select_classes(images: _Images, labels: tuple[str, ...]) -> _Images:
    """Keep the classes *labels* of *images*, in this order; leave out images of other classes.

    With several classes per image, no image is left out; some may remain without a class.
    """
    if images.is_multi_label:
        columns = [images.labels.index(label) for label in labels]
        return images.replaced(labels=labels, targets=images.targets[:, columns])
    position = {label: index for index, label in enumerate(labels)}
    new_index = np.asarray([position.get(label, -1) for label in images.labels], dtype=np.int64)
    targets = new_index[images.targets.astype(np.int64)]
    kept = targets >= 0  # -1 is a class to leave out
    return images.select(kept).replaced(labels=labels, targets=targets[kept])


def map_threaded(function: Callable[[int], _Result], count: int) -> Iterator[_Result]:
    """Yield *function*(0) to *function*(count - 1) in order, computed by one thread per core."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for results in pool.map(lambda chunk: [function(index) for index in chunk], chunks):
            yield from results


def hash_images(images: LabeledImages) -> NDArray[np.int64]:
    """Return the `file_hash` of each of *images*, (N,); that of an unreadable file is `UNREADABLE`."""

    def hash_image(index: int) -> int:
        try:
            return images.photo(index).file_hash
        except DataError:
            return UNREADABLE

    return np.fromiter(map_threaded(hash_image, len(images)), dtype=np.int64, count=len(images))


def count_formats(images: LabeledImages) -> Counter[str]:
    """Count *images* by the format of their file, a name of `FORMATS`; others are left out."""
    heads = map_threaded(images.read_head, len(images))
    return Counter(filter(None, map(format_of, heads)))


def describe_contradictions(images: LabeledImages, hashes: NDArray[np.int64]) -> str:
    """Name the images with equal *hashes* (N,), those of `hash_images`, and different labels; "" if none."""
    _, first_of_hash, hash_number_N = np.unique(hashes, return_index=True, return_inverse=True)
    # For each image, the index of the first one with its hash.
    first_N = first_of_hash[hash_number_N].tolist()
    # Shape (N,), or (N, C) if an image can have several classes.
    is_equal = images.targets[first_N] == images.targets
    same_labels_N = is_equal if is_equal.ndim == 1 else is_equal.all(axis=1)
    is_readable_N = hashes != UNREADABLE
    # Images with other labels than the first one with their hash.
    contradictions = np.flatnonzero(is_readable_N & ~same_labels_N).tolist()
    pairs = [
        f"{images.describe(first_N[index])} = {images.describe(index)}"
        for index in contradictions
    ]
    return (
        f"the same file has different labels; delete one of each: {shorten(pairs, '; ')}"
        if pairs
        else ""
    )


def count_seen(images: LabeledImages, hashes: Sequence[int] | NDArray[np.int64]) -> int:
    """Count the *images* whose files have one of the *hashes*, those of training images."""
    if not len(hashes):
        return 0
    hashes_N = hash_images(images)
    return int((np.isin(hashes_N, hashes) & (hashes_N != UNREADABLE)).sum())


def describe_seen(
    images: LabeledImages, hashes: Sequence[int] | NDArray[np.int64], *, is_sample: bool = False
) -> str:
    """Say how many of *images* a network was trained on, whose training files have *hashes*; "" if none."""
    seen = count_seen(images, hashes)
    if not seen:
        return ""
    return (
        f"{'at least ' if is_sample else ''}{seen} of {len(images)} images are training images of this "
        "network, so that these figures are too high for new images"
    )


def find_unreadable(images: LabeledImages) -> dict[int, str]:
    """Return the messages of the errors of the images that cannot be decoded, by index."""

    def error_of(index: int) -> str:
        try:
            images.photo(index).check()
        except DataError as error:
            return str(error)
        return ""

    return {
        index: error for index, error in enumerate(map_threaded(error_of, len(images))) if error
    }


def unreadable_images_error(first: DataError, *parts: LabeledImages) -> DataError:
    """Build an error with every unreadable image of *parts*; return *first* if there is only one."""
    return _name_all(
        first, [error for part in parts for error in find_unreadable(part).values()]
    )


def _name_all(first: DataError, errors: Sequence[str]) -> DataError:
    if len(errors) < 2:
        return first
    return DataError(
        f"{len(errors)} images cannot be used (`sopdeploy data check --json` lists all): "
        f"{shorten_problems(errors)}",
        lists={"images": errors},
    )


def leave_out_unreadable(split: Split, first: DataError) -> Split:
    """Leave the damaged and missing images of *split* out; its note names them.

    *first* is the error of the image that was met first; it is raised if all images can be read.
    Raises an error that names all unusable images if they are too many (`MAX_DAMAGED`,
    `MANY_DAMAGED`), or if too few images remain of a class, or no held-out ones.
    """
    found = list[LeftOut]()
    errors = list[str]()

    for name, images in (("train", split.train), ("held_out", split.held_out)):
        for index, error in find_unreadable(images).items():
            reason = error.removeprefix(f"{images.describe(index)}: ")
            found.append(LeftOut(name, images.identity(index), reason))
            errors.append(error)
    if not found:
        raise first

    # What remains must suffice: two images of each class, or one with held-out images.
    count = len(split.train) + len(split.held_out)
    remaining = split.without(found)
    least = np.minimum(split.train.class_counts(), 1 if len(split.held_out) else 2)
    too_few = (remaining.train.class_counts() < least).any() or (
        len(split.held_out) and not len(remaining.held_out)
    )
    if too_few or (len(found) >= MANY_DAMAGED and len(found) > MAX_DAMAGED * count):
        raise _name_all(first, errors)

    return replace(remaining, notes=(describe_left_out(errors),))


def describe_left_out(errors: Sequence[str]) -> str:
    """Name the images that a run leaves out, given as texts `IMAGE: REASON`."""
    return f"{amount(len(errors), 'unusable image')} left out: {shorten_problems(errors)}"
