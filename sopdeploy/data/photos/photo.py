"""Labeled photographs: their bytes, targets and identities, and the parts of a data source.

Letters: N images, C classes.
"""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.base.files import advise_on, read_file
from sopdeploy.base.names import label_problem
from sopdeploy.base.project import AS_IT_IS, FolderReading
from sopdeploy.data.photos.spelling import normalize
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images.decode import decode, decode_upright
from sopdeploy.images.formats import open_image
from sopdeploy.images.limits import MAX_BYTES
from sopdeploy.images.metadata import capture_time
from sopdeploy.images.pixels import ChooseView, preprocess_image
from sopdeploy.images.preprocess import Pixels, Preprocess
from sopdeploy.images.signatures import HEAD_BYTES, read_head

# How much of a photograph is decoded to compare it, or to show it
SHOWN = Preprocess(decoding="fast")
SMALLEST = Preprocess(decoding="fast", resize=1, crop=1)  # still reads every byte
MAX_LEFT_OUT = 0.05  # share of the images that are damaged or missing
MANY_LEFT_OUT = 3
_Images = TypeVar("_Images", bound="LabeledImages")


def can_leave_out(count: int, total: int) -> bool:
    """Tell whether *count* of *total* images, which are damaged or missing, are few enough to leave out."""
    return count < MANY_LEFT_OUT or count <= MAX_LEFT_OUT * total


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
        """The image; only its header is read. Raises `DataError` if the file is not an image."""
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

    Examples:
        >>> class Files(sopdeploy.LabeledImages):
        ...     PER_IMAGE = ("paths", *sopdeploy.LabeledImages.PER_IMAGE)
        ...
        ...     def __init__(self, paths, labels, targets):
        ...         self.paths, self.labels, self.targets = paths, labels, targets
        ...
        ...     def read(self, index):
        ...         return open(self.paths[index], "rb").read()
        ...
        ...     def identity(self, index):
        ...         return str(self.paths[index])
        >>> import numpy as np
        >>> images = Files(np.array(["a.jpg", "b.jpg"]), ("cat", "dog"), np.array([0, 1]))
        >>> images.select(images.targets == 1).identity(0)
        'b.jpg'
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

    def select(self, mask: NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        """Keep the images where *mask* (N,) is true, or those at its indices, in their order."""
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
        """Return nothing: pixels in memory are not a file."""
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
            raise DataError(f"{path}: {advise_on(error, 'repair or delete it')}") from error

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
    `left_out` are the unusable images that are no longer in the parts, and `reading` says how
    a folder was read.

    Examples:
        >>> import numpy as np
        >>> from sopdeploy.data.photos.photo import ArrayImages
        >>> pixels = np.zeros((4, 8, 8), np.uint8)
        >>> images = ArrayImages(("dark", "bright"), pixels, np.arange(4) % 2)
        >>> len(sopdeploy.Split.undivided(images).held_out)
        0
    """

    train: LabeledImages
    held_out: LabeledImages
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    reading: FolderReading = AS_IT_IS

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

    def without_held_out(self, left_out: NDArray[np.bool_]) -> "Split":
        """Leave out held-out images (M,), or all if a class would lose all of them.

        What remains would judge other classes than those of the network.
        """
        rest = self.held_out.select(~left_out)
        if ((self.held_out.class_counts() > 0) & (rest.class_counts() == 0)).any():
            rest = self.held_out.select(np.zeros(len(left_out), np.bool_))
        return replace(self, held_out=rest)

    @classmethod
    def undivided(cls, images: LabeledImages, notes: Sequence[str] = ()) -> "Split":
        """Create a split without held-out images."""
        return cls(
            train=images,
            held_out=images.select(np.zeros(len(images), np.bool_)),
            notes=tuple(notes),
        )


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
