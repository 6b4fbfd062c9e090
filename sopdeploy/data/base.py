"""Dataset types (labeled images of any size, labeled uint8 arrays of one size) and random seeds.

Every random choice of a run uses `derive_seed(seed, purpose, epoch, step or sample)` instead of a generator
state that must be saved. A resumed run therefore makes the same choices as an uninterrupted one, with any
number of loader processes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.config import StrictModel
from sopdeploy.data.folders import Log
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess

_SUBSET_SEED = 0  # not the seed of the run: the same number gives the same classes in every run
Item = TypeVar("Item", covariant=True)
Target = int | NDArray[np.float32]  # a class index, or (C,) with 1 for every class of the image


class LabeledItems(Protocol[Item]):
    """Items with their targets; `labels` are the class names in output order."""

    @property
    def labels(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Item, Target]: ...


class LabeledImages(LabeledItems[Image.Image], Protocol):
    """Images of any size and mode with their targets."""

    @property
    def targets(self) -> NDArray[np.int64] | NDArray[np.float32]:
        """Class indices (N,), or (N, C) with 1 for every class of an image; reads no images."""


Dataset = LabeledItems[NDArray[np.uint8]]  # network inputs: (height, width, 3) arrays of one size


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Training and held-out images with the same labels; `skipped` lists unreadable files left out.

    `divided` is true if the held-out images were selected from the training folder, not given separately.
    """

    train: LabeledImages
    held_out: LabeledImages
    skipped: tuple[str, ...] = ()
    divided: bool = False


@dataclass(frozen=True, slots=True)
class ImagesDataset:
    """Base class of datasets that convert the images of a source."""

    images: LabeledImages

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in output order."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class PreprocessedDataset(ImagesDataset):
    """Images preprocessed exactly as the service does, for evaluation."""

    preprocess: Preprocess

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Target]:
        image, target = self.images[index]
        return preprocess_image(image, self.preprocess), target


@dataclass(frozen=True, slots=True)
class ArrayImages:
    """Images in memory: (N, H, W) gray or (N, H, W, 3) RGB, uint8."""

    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])

    def select(self, mask: NDArray[np.bool_]) -> "ArrayImages":
        """Keep the images where *mask* (N,) is true."""
        return replace(self, images=self.images[mask], targets=self.targets[mask])


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


class DataSource(ClassSubset):
    """Base class of the options of a data source that a plug-in adds; the field `kind` is its name."""

    def open(self, log: Log) -> Split:
        """Open the training and held-out images; *log* receives warnings.

        Raises `DataError` if they cannot be used.
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
    train, held_out = (_select_classes(images, kept) for images in (split.train, split.held_out))
    return replace(split, train=train, held_out=held_out)


def _select_classes(images: Any, labels: tuple[str, ...]) -> Any:
    """Keep the images of the classes *labels*, with targets in this order."""
    position = {label: index for index, label in enumerate(labels)}
    new = np.asarray([position.get(label, -1) for label in images.labels], dtype=np.int64)
    targets = new[images.targets.astype(np.int64)]
    return replace(images.select(targets >= 0), labels=labels, targets=targets[targets >= 0])
