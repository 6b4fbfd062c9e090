"""ImageNet at 64 x 64 or 32 x 32 pixels: the official batch files, or the .mat file of GM-SOP.

Source: Chrabaszcz et al., "A Downsampled Variant of ImageNet" (2017): `train_data_batch_1` to `_10` and
`val_data`, each a pickle or .npz with `data` (N, 3 * side * side) uint8, one color channel after the other,
and `labels` from 1. If a folder holds both forms of a file, the .npz is read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.data.base import Split
from sopdeploy.data.datasets.array_pickle import read_array_pickle
from sopdeploy.data.subset import ClassSubset
from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import expand_user

SIDES = {"imagenet64": 64, "imagenet32": 32}
TRAIN_FILE = re.compile(r"train_data_batch_(?P<number>\d+)(\.npz)?$")
HELD_OUT_FILE = re.compile(r"val_data(?P<number>)(\.npz)?$")
MAT_TRAIN_SET, MAT_HELD_OUT_SETS = 1, (2, 3)
CHUNK = 8192  # images read from a .mat file at a time
Batches = list[
    tuple[NDArray[np.uint8], NDArray[np.int64]]
]  # images (N, 3 * side * side), classes (N,) from 0


class SmallImageNetConfig(ClassSubset):
    """`path` is the folder of the batch files, or the .mat file.

    `labels` is a text file with one class name per line in the official order. Without it the classes are
    named by their numbers, 0001 to 1000.
    """

    kind: Literal["imagenet64", "imagenet32"]
    path: Path | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class PlanarImages:
    """Images in memory, one array (N, 3 * side * side) uint8 per file, one color channel after the other."""

    labels: tuple[str, ...]
    parts: tuple[NDArray[np.uint8], ...]
    starts: NDArray[np.int64]
    targets: NDArray[np.int64]
    side: int

    @classmethod
    def join(cls, batches: Batches, labels: tuple[str, ...], side: int) -> "PlanarImages":
        """Join *batches* without copying their images."""
        counts = [len(targets) for _, targets in batches]
        return cls(
            labels=labels,
            parts=tuple(data for data, _ in batches),
            starts=np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64),
            targets=np.concatenate([targets for _, targets in batches]),
            side=side,
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        planes = self.parts[part][index - int(self.starts[part])].reshape(3, self.side, self.side)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))), int(self.targets[index])


def open_small_imagenet(config: SmallImageNetConfig) -> Split:
    """Open the official training and validation images; raises `DataError` naming what is wrong."""
    if config.path is None:
        raise ConfigError("data.path: not set; give the folder with train_data_batch_1 etc., or a .mat file")
    root, side = expand_user(config.path), SIDES[config.kind]
    if root.suffix == ".mat":
        train, held_out = _read_imdb(root, side)
    elif root.is_dir():
        parts = []
        for pattern in (TRAIN_FILE, HELD_OUT_FILE):
            matches = [(pattern.match(file.name), file) for file in sorted(root.iterdir()) if file.is_file()]
            files = {int(match["number"] or 0): file for match, file in matches if match}
            parts.append([_read_batch(file, side) for _, file in sorted(files.items())])
        train, held_out = parts
    else:
        raise DataError(f"{root}: no such folder or .mat file; give the official files")
    for name, batches in {"train_data_batch_1": train, "val_data": held_out}.items():
        if not batches:
            raise DataError(f"{root}: holds no {name}; put the official files there")
    labels = _class_names(config, root, [targets for _, targets in (*train, *held_out)])
    return Split(
        train=PlanarImages.join(train, labels, side), held_out=PlanarImages.join(held_out, labels, side)
    )


def _read_batch(path: Path, side: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if path.suffix == ".npz":
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                values = {name: stored[name] for name in ("data", "labels") if name in stored}
        except Exception as error:  # a damaged file can make numpy raise anything
            raise DataError(f"{path}: damaged .npz file ({error}); copy it again") from error
    else:
        values = read_array_pickle(path)
    data, labels = values.get("data"), values.get("labels")
    if not isinstance(data, np.ndarray) or labels is None:
        raise DataError(f"{path}: holds no data and labels; use the official file")
    targets = np.asarray(labels).reshape(-1)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * side * side:
        raise DataError(
            f"{path}: holds {data.dtype} of shape {data.shape}, not (N, {3 * side * side}) uint8; "
            f"is it of another size than {side} x {side}?"
        )
    if targets.shape != (len(data),) or targets.dtype.kind not in "iu" or targets.min(initial=1) < 1:
        raise DataError(f"{path}: needs one class, counted from 1, for each of its {len(data)} images")
    return data, targets.astype(np.int64) - 1


def _class_names(
    config: SmallImageNetConfig, root: Path, targets: list[NDArray[np.int64]]
) -> tuple[str, ...]:
    seen = np.unique(np.concatenate(targets))
    classes = int(seen.max(initial=-1)) + 1
    if classes < 2:
        raise DataError(f"{root}: a classifier needs at least two classes; use the official files")
    missing = sorted(set(range(classes)) - set(seen.tolist()))
    if missing:
        numbers = ", ".join(str(number + 1) for number in missing)
        raise DataError(f"{root}: no images of the classes {numbers}; use the official files")
    if config.labels is None:
        return tuple(f"{number + 1:04}" for number in range(classes))
    try:
        names = expand_user(config.labels).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.labels}: cannot be read ({error}); give one name per line") from error
    if len(names) != classes or len(set(names)) != classes or not all(names):
        raise DataError(f"{config.labels}: needs {classes} different names, one per line")
    return tuple(names)


def _read_imdb(path: Path, side: int) -> tuple[Batches, Batches]:
    h5py = import_optional("h5py", "h5py", "sopdeploy[import]", DataError, str(path))
    try:
        with h5py.File(path, "r") as file:
            imdb = _child(h5py, file, "imdb") if "imdb" in file else file
            images = _child(h5py, imdb, "images")
            data, labels, sets = (_child(h5py, images, name) for name in ("data", "labels", "set"))
            return _read_images(path, data, labels, sets, side)
    except DataError:
        raise
    except Exception as error:  # a damaged file can make h5py raise anything
        raise DataError(f"{path}: damaged MATLAB 7.3 imdb ({error}); copy it again") from error


def _child(h5py: Any, group: Any, name: str) -> Any:
    """Get *name* of *group*; refuses links and datasets that read other files."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing or a link to another file")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        raise ValueError(f"{name} stores its values in another file")
    return found


def _read_images(path: Path, data: Any, labels: Any, sets: Any, side: int) -> tuple[Batches, Batches]:
    if data.dtype != np.uint8 or data.shape[1:] != (3, side, side):
        raise DataError(
            f"{path}: holds {data.dtype} of shape {data.shape}, not (N, 3, {side}, {side}) uint8; "
            f"is it of another size than {side} x {side}?"
        )
    targets = np.asarray(labels[()]).reshape(-1).astype(np.int64) - 1
    kinds = np.asarray(sets[()]).reshape(-1)
    if not len(data) == len(targets) == len(kinds) or targets.min(initial=0) < 0:
        raise DataError(
            f"{path}: needs one class, counted from 1, and one set for each of its {len(data)} images"
        )
    images = np.empty((len(data), 3 * side * side), dtype=np.uint8)
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]  # (n, 3, width, height)
        images[start : start + len(chunk)] = chunk.transpose(0, 1, 3, 2).reshape(len(chunk), -1)

    parts: list[Batches] = []
    for mask in (kinds == MAT_TRAIN_SET, np.isin(kinds, MAT_HELD_OUT_SETS)):
        # views of consecutive images, so that none is copied
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        parts.append([(images[first:last], targets[first:last]) for first, last in edges])
    return parts[0], parts[1]
