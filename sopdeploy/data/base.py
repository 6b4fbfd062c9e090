"""What data is: labelled pictures on one side, labelled uint8 arrays of one size on the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.seeds import derive_seed


class LabeledImages(Protocol):
    """Pictures of any size and mode as they are stored, each with the position of its class in `labels`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names in output order."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """Return the class of each picture, without reading one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class Dataset(Protocol):
    """What a network is fed with: (height, width, 3) uint8 arrays of one size, each with its class."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names in output order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Pictures to learn from, and pictures that are only ever measured on; the labels are the same.

    `skipped` names the files that were left out because they cannot be read.
    """

    train: LabeledImages
    held_out: LabeledImages
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImagesDataset:
    """What every way to look at pictures has from them."""

    pictures: LabeledImages

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names in output order."""
        return self.pictures.labels

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True, slots=True)
class PreprocessedDataset(ImagesDataset):
    """Pictures as the service would prepare them: evaluation sees exactly what is served."""

    preprocess: Preprocess

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        picture, label = self.pictures[index]
        return self.preprocess(picture), label


@dataclass(frozen=True, slots=True)
class ArrayImages:
    """Small pictures that fit in memory: (N, H, W) grey or (N, H, W, 3) RGB, uint8."""

    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


def hold_out(keys: Sequence[str], targets: Sequence[int], fraction: float, seed: int) -> list[bool]:
    """Say of each picture whether it is held out: *fraction* of every class, at least one and not all.

    The choice depends on *seed* and the pictures' *keys* alone, so that it is the same on every machine
    and in every version: a picture that was learnt from is never measured on later.
    """
    members: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        members.setdefault(target, []).append(index)
    held = [False] * len(keys)
    for indices in members.values():
        drawn = sorted(indices, key=lambda index: (derive_seed(seed, "hold-out", keys[index]), keys[index]))
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        for index in drawn[:count]:
            held[index] = True
    return held
