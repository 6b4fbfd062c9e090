"""ImageNet at 64 x 64 or 32 x 32 pixels: the official batch files, or one .mat file as GM-SOP distributes it.

Source: Chrabaszcz et al., "A Downsampled Variant of ImageNet" (2017): `train_data_batch_1` to `_10` and
`val_data`, each a pickle or .npz with `data` (N, 3 * side * side) uint8, plane by plane, and `labels` from 1.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.config import StrictModel
from sopdeploy.data.base import Split
from sopdeploy.data.datasets.array_pickle import read_array_pickle
from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError, DataError

TRAIN_SET, HELD_OUT_SETS = 1, (2, 3)
AT_A_TIME = 8192  # pictures
Batches = list[tuple[NDArray[np.uint8], NDArray[np.int64]]]


def read_imdb(path: Path, side: int) -> tuple[Batches, Batches]:
    """Return training and held-out pictures of *path*: (N, 3 * side * side) uint8 and classes (N,) from 0.

    Raises `DataError` where h5py is missing, the file is damaged, or keeps its numbers in other files.
    """
    h5py = import_optional("h5py", "h5py", "sopdeploy[import]", DataError, str(path))
    try:
        with h5py.File(path, "r") as file:
            images = part(h5py, part(h5py, file, "imdb", file), "images")
            data, labels, sets = (part(h5py, images, name) for name in ("data", "labels", "set"))
            return read_images(path, data, labels, sets, side)
    except DataError:
        raise
    except Exception as problem:  # whatever a damaged file makes of HDF5's readers
        raise DataError(f"{path}: not a whole MATLAB 7.3 imdb ({problem}); copy it again") from problem


def part(h5py: Any, group: Any, name: str, default: Any = None) -> Any:
    """Return *name* of *group*, which must lie in this very file; *default* where it is missing."""
    link = group.get(name, getlink=True)
    if link is None and default is not None:
        return default
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name} is missing or lies in another file")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        raise ValueError(f"{name} has its numbers in another file")
    return found


def read_images(path: Path, data: Any, labels: Any, sets: Any, side: int) -> tuple[Batches, Batches]:
    """Return both parts of an imdb; raises `DataError` where its shapes disagree."""
    if data.dtype != np.uint8 or data.shape[1:] != (3, side, side):
        raise DataError(
            f"{path}: holds {data.dtype} of shape {data.shape}, not (N, 3, {side}, {side}) uint8; "
            f"is it of another size than {side} x {side}?"
        )
    targets = np.asarray(labels[()]).reshape(-1).astype(np.int64) - 1
    kinds = np.asarray(sets[()]).reshape(-1)
    if not len(data) == len(targets) == len(kinds) or targets.min(initial=0) < 0:
        raise DataError(f"{path}: needs one class from 1 and one set for each of its {len(data)} pictures")
    pictures = np.empty((len(data), 3 * side * side), dtype=np.uint8)
    for start in range(0, len(data), AT_A_TIME):
        piece = data[start : start + AT_A_TIME]  # (n, 3, width, height)
        pictures[start : start + len(piece)] = piece.transpose(0, 1, 3, 2).reshape(len(piece), -1)
    return runs(pictures, targets, kinds == TRAIN_SET), runs(pictures, targets, np.isin(kinds, HELD_OUT_SETS))


def runs(pictures: NDArray[np.uint8], targets: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Batches:
    """Return the *chosen* pictures as stretches of the whole, so that none is copied."""
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [(pictures[first:last], targets[first:last]) for first, last in edges]


SIDES = {"imagenet64": 64, "imagenet32": 32}
TRAIN = re.compile(r"train_data_batch_(?P<number>\d+)(\.npz)?$")
HELD_OUT = re.compile(r"val_data(?P<number>)(\.npz)?$")


class SmallImageNetConfig(StrictModel):
    """`path` is the folder of the batch files, or the .mat file.

    `labels` is a text file with the names of the classes in the official order, one a line; without it they
    are called by their numbers, 0001 to 1000.
    """

    kind: Literal["imagenet64", "imagenet32"]
    path: Path | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class PlaneImages:
    """Pictures that fit in memory, file by file: each (N, 3 * side * side) uint8, plane by plane."""

    labels: tuple[str, ...]
    parts: tuple[NDArray[np.uint8], ...]
    starts: NDArray[np.int64]
    targets: NDArray[np.int64]
    side: int

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        planes = self.parts[part][index - int(self.starts[part])].reshape(3, self.side, self.side)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))), int(self.targets[index])


def open_small_imagenet(config: SmallImageNetConfig) -> Split:
    """Return the official training and validation pictures; raises `DataError` naming what is wrong."""
    if config.path is None:
        raise ConfigError(
            "data.path: not set; give the folder of train_data_batch_1 and so on, or a .mat file"
        )
    root, side = config.path.expanduser(), SIDES[config.kind]
    if root.suffix == ".mat":
        train, held_out = read_imdb(root, side)
    elif root.is_dir():
        files = sorted(file for file in root.iterdir() if file.is_file())
        train = [read_batch(file, side) for file in batches_of(files, TRAIN)]
        held_out = [read_batch(file, side) for file in batches_of(files, HELD_OUT)]
    else:
        raise DataError(f"{root}: no such folder or .mat file; give what the data set's site offers")
    for name, batches in {"train_data_batch_1": train, "val_data": held_out}.items():
        if not batches:
            raise DataError(f"{root}: holds no {name}; put the official files there")
    labels = class_names(config, root, [targets for _, targets in (*train, *held_out)])
    return Split(train=together(train, labels, side), held_out=together(held_out, labels, side))


def batches_of(files: list[Path], pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of one part in the order of their numbers."""
    found = [(int(match["number"] or 0), file) for file in files if (match := pattern.match(file.name))]
    return [file for _, file in sorted(found)]


def read_batch(path: Path, side: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return pictures (N, 3 * side * side) and classes (N,) from 0 of one file; raises `DataError`."""
    values = read_npz(path) if path.suffix == ".npz" else read_array_pickle(path)
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
        raise DataError(f"{path}: needs one class from 1 for each of its {len(data)} pictures")
    return data, targets.astype(np.int64) - 1


def read_npz(path: Path) -> dict[str, Any]:
    """Return the arrays of an .npz file; raises `DataError`."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("data", "labels") if name in stored}
    except Exception as problem:  # whatever a damaged file makes of numpy's readers
        raise DataError(f"{path}: not a whole .npz file ({problem}); copy it again") from problem


def class_names(config: SmallImageNetConfig, root: Path, targets: list[NDArray[np.int64]]) -> tuple[str, ...]:
    """Return the names of all classes; raises `DataError` where a class has no picture or no name."""
    seen = np.unique(np.concatenate(targets))
    classes = int(seen.max(initial=-1)) + 1
    if classes < 2:
        raise DataError(f"{root}: a classifier needs at least two classes")
    missing = sorted(set(range(classes)) - set(seen.tolist()))
    if missing:
        raise DataError(f"{root}: no pictures of the classes {', '.join(str(c + 1) for c in missing)}")
    if config.labels is None:
        return tuple(f"{number + 1:04}" for number in range(classes))
    try:
        names = config.labels.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{config.labels}: cannot be read ({problem}); give one name a line") from problem
    if len(names) != classes or len(set(names)) != classes or not all(names):
        raise DataError(f"{config.labels}: needs {classes} different names, one a line")
    return tuple(names)


def together(
    batches: list[tuple[NDArray[np.uint8], NDArray[np.int64]]], labels: tuple[str, ...], side: int
) -> PlaneImages:
    """Return the pictures of all *batches*; none is copied."""
    counts = [len(targets) for _, targets in batches]
    return PlaneImages(
        labels=labels,
        parts=tuple(data for data, _ in batches),
        starts=np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64),
        targets=np.concatenate([targets for _, targets in batches]),
        side=side,
    )
