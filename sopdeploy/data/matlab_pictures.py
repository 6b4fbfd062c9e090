"""Downsampled ImageNet as GM-SOP distributes it: one MATLAB 7.3 file (HDF5) with an `imdb`.

`images/data` is MATLAB's (height, width, 3, N) uint8, in HDF5 with its axes reversed; `images/labels` are the
classes from 1; `images/set` is 1 for training, 2 or 3 for what is measured on, as in MatConvNet.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import DataError
from sopdeploy.extras import imported

TRAIN_SET, HELD_OUT_SETS = 1, (2, 3)
AT_A_TIME = 8192  # pictures
Batches = list[tuple[NDArray[np.uint8], NDArray[np.int64]]]


def read_imdb(path: Path, side: int) -> tuple[Batches, Batches]:
    """Return training and held-out pictures of *path*: (N, 3 * side * side) uint8 and classes (N,) from 0.

    Raises `DataError` where h5py is missing, the file is damaged, or keeps its numbers in other files.
    """
    h5py = imported("h5py", "h5py", "sopdeploy[import]", DataError, str(path))
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
