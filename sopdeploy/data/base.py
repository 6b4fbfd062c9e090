"""Dataset types (labeled images of any size, labeled uint8 arrays of one size) and random seeds.

Every random choice of a run uses `derive_seed(seed, purpose, epoch, step or sample)` instead of a generator
state that must be saved. A resumed run therefore makes the same choices as an uninterrupted one, with any
number of loader processes.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Annotated, Any, Self

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.config import StrictModel
from sopdeploy.data.folders import Log
from sopdeploy.errors import ConfigError, DataError, ImageError
from sopdeploy.images.formats import load_pixels, open_image
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess

_SUBSET_SEED = 0  # not the seed of the run: the same number gives the same classes in every run
Target = int | NDArray[np.float32]  # a class index, or (C,) with 1 for every class of the image


class LabeledImages(ABC):
    """Base class of the images of a data source: images of any size and mode with their targets.

    Attributes:
        labels: Class names in output order.
        targets: Class indices (N,) int64, or (N, C) float32 with 1 for every class of an image.
        groups: Images with equal values (N,) show one object or one burst and are never divided; None if no
            groups are known.
    """

    labels: tuple[str, ...]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read an encoded image, such as the bytes of a JPEG; raises `DataError` naming it."""

    @abstractmethod
    def identity(self, index: int) -> str:
        """Return a name that no other image has and that is the same on every machine.

        With the seed, the names determine which images are held out. Reports show them.
        """

    @abstractmethod
    def select(self, mask: NDArray[np.bool_]) -> Self:
        """Keep the images where *mask* (N,) is true."""

    def describe(self, index: int) -> str:
        """Return what messages call an image: its identity, or the path of its file."""
        return self.identity(index)

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding its pixels; raises `DataError` naming it."""
        with image_errors(self.describe(index)):
            return open_image(self.read(index))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        with image_errors(self.describe(index)):
            return load_pixels(self.open(index)), self.target(index)

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

    def replaced(self, **attributes: Any) -> Self:
        """Copy the images with other `labels`, `targets` or `groups`."""
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
        raise DataError(f"{name}: {error}; repair, convert or delete it") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Training and held-out images with the same labels; `skipped` lists unreadable files left out.

    `held_out` is empty if the source has no such images. The procedure that trains then decides whether it
    holds out some of the training images (`near.hold_out_images`).
    """

    train: LabeledImages
    held_out: LabeledImages
    skipped: tuple[str, ...] = ()

    @classmethod
    def undivided(cls, images: LabeledImages) -> "Split":
        """Create a split without held-out images."""
        return cls(train=images, held_out=images.select(np.zeros(len(images), np.bool_)))


@dataclass(frozen=True, slots=True)
class Dataset(ABC):
    """Base class of network inputs: the `images` of a source, converted to uint8 arrays of one size."""

    images: LabeledImages

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in output order."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Target]: ...


@dataclass(frozen=True, slots=True)
class PreprocessedDataset(Dataset):
    """Images preprocessed exactly as the service does, for evaluation.

    With `pad`, they are padded with that many black pixels and cropped at an offset that the pixels decide.
    """

    preprocess: Preprocess
    pad: int = 0

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Target]:
        image, target = self.images[index]
        array, pad = preprocess_image(image, self.preprocess), self.pad
        if pad:
            digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
            top, left = (int.from_bytes(half, "big") % (2 * pad + 1) for half in (digest[:8], digest[8:]))
            padded = np.pad(array, ((pad, pad), (pad, pad), (0, 0)))
            array = padded[top : top + self.preprocess.crop, left : left + self.preprocess.crop]
        return array, target


@dataclass(frozen=True, slots=True)
class ArrayImages(LabeledImages):
    """Images in memory: (N, H, W) gray or (N, H, W, 3) RGB, uint8."""

    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None

    def read(self, index: int) -> bytes:
        """Encode an image as BMP, which loses no pixel."""
        file = BytesIO()
        self.open(index).save(file, "BMP")
        return file.getvalue()

    def identity(self, index: int) -> str:
        """Return the position of an image."""
        return str(index)

    def open(self, index: int) -> Image.Image:
        """Return an image."""
        return Image.fromarray(self.images[index])

    def select(self, mask: NDArray[np.bool_]) -> "ArrayImages":
        """Keep the images where *mask* (N,) is true."""
        groups = None if self.groups is None else self.groups[mask]
        return replace(self, images=self.images[mask], targets=self.targets[mask], groups=groups)


def derive_seed(*keys: int | str) -> int:
    """Hash *keys* to a 63-bit seed that is the same on every machine and in every version."""
    text = "\x1f".join(str(key) for key in keys)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def hold_out(
    keys: Sequence[str], targets: NDArray[np.int64] | NDArray[np.float32], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Select about *fraction* of every class for the held-out set, at least one image and never all.

    Returns a mask (N,). The selection depends on *seed* and the images' *keys* only. It is the same on every
    machine and in every version, so that an image used for training is never used for evaluation later.
    *targets* are class indices (N,), or (N, C) with 1 for every class of an image. With (N, C), the classes
    are processed from the rarest to the most frequent one, then the images without a class, as in the
    iterative stratification of Sechidis et al. (ECML 2011), section 4.
    """
    shuffled = sorted(
        range(len(keys)), key=lambda index: (derive_seed(seed, "hold-out", keys[index]), keys[index])
    )
    rank = np.argsort(shuffled)  # position of each image in `shuffled`
    if targets.ndim == 1:
        by_class = np.argsort(targets, kind="stable")
        groups = np.split(by_class, np.flatnonzero(np.diff(targets[by_class])) + 1)
    else:
        by_count = np.argsort(np.count_nonzero(targets, axis=0), kind="stable")
        groups = [np.flatnonzero(targets[:, target]) for target in by_count]
        groups.append(np.flatnonzero(~targets.any(axis=1)))
    held_out, decided = np.zeros((2, len(keys)), dtype=np.bool_)  # an image can be in several groups
    for members in groups:
        quota = min(max(1, round(fraction * len(members))), len(members) - 1)
        needed = max(0, quota - held_out[members].sum())
        undecided = members[~decided[members]]
        held_out[undecided[np.argsort(rank[undecided])][:needed]] = True
        decided[members] = True
    return held_out


class ClassSubset(StrictModel):
    """Base class of data configs; `classes` is the number of classes to draw. They keep their order.

    GSoP's Tables 3 and 4 draw 250 classes of ImageNet.
    """

    classes: Annotated[int, pydantic.Field(ge=2)] | None = None


class HoldOut(ClassSubset):
    """Selection of the held-out images of a source that has none of its own.

    The training loop holds out the fraction `hold_out` of every class, selected by `hold_out_seed`. It is not
    the seed of the run, so all runs are evaluated on the same images.
    """

    hold_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    hold_out_seed: int = 0


class DataSource(HoldOut):
    """Base class of the options of a data source that a plug-in adds; the field `kind` is its name."""

    def open(self, log: Log) -> Split:
        """Open the training and held-out images (`Split.undivided` if there are none of these).

        *log* receives warnings. Raises `DataError` if the images cannot be used.
        """
        raise NotImplementedError


def select_subset(split: Split, classes: int) -> Split:
    """Keep the images of *classes* drawn classes.

    Raises `DataError` for more classes than the data have, `ConfigError` if images have several classes.
    """
    if split.train.targets.ndim == 2:
        raise ConfigError("data.classes: not for several classes per image; remove it")
    labels = split.train.labels
    if classes > len(labels):
        raise DataError(
            f"data.classes: {classes}, but the data have {len(labels)} classes; give a smaller number"
        )
    names = sorted(labels, key=lambda label: (derive_seed(_SUBSET_SEED, "classes", label), label))[:classes]
    kept = tuple(label for label in labels if label in names)
    train, held_out = (select_classes(images, kept) for images in (split.train, split.held_out))
    return replace(split, train=train, held_out=held_out)


def select_classes(images: LabeledImages, labels: tuple[str, ...]) -> LabeledImages:
    """Keep the classes *labels* of *images* in this order, and the images (N,) of these classes.

    An image (N, C) of other classes remains, without a class.
    """
    if images.targets.ndim == 2:
        columns = [images.labels.index(label) for label in labels]
        return images.replaced(labels=labels, targets=images.targets[:, columns])
    position = {label: index for index, label in enumerate(labels)}
    new = np.asarray([position.get(label, -1) for label in images.labels], dtype=np.int64)
    targets = new[images.targets.astype(np.int64)]
    return images.select(targets >= 0).replaced(labels=labels, targets=targets[targets >= 0])
