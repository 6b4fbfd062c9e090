"""MATLAB's version 7.3: HDF5, of which only what MATLAB itself writes is followed.

Structs are groups, arrays of structs groups of references, cells references, text 16-bit numbers; every array
has its axes reversed. Links to other files, data kept in other files and virtual datasets are
refused: a weight file has no business in the rest of a disk.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.errors import WeightsError
from sopdeploy.extras import imported
from sopdeploy.importers.matlab_v5 import DEEPEST, MOST_BYTES, MOST_PARTS, VARIABLES, DamagedError

NOT_READ = {
    "vars",
    "inputs",
    "outputs",
    "learningRate",
    "weightDecay",
    "trainOpts",
}  # hundreds of small parts
CLASS, EMPTY = "MATLAB_class", "MATLAB_empty"


def read_hdf5(path: Path, wanted: Collection[str] = VARIABLES) -> dict[str, Any]:
    """Return the *wanted* variables of the file at *path*, as `read_v5` does; raises `WeightsError`."""
    h5py = imported("h5py", "h5py", "sopdeploy[import]", WeightsError, str(path))
    try:
        with h5py.File(path, "r") as file:
            tree = Tree(h5py, file)
            return {name: tree.child(file, name, 0) for name in file if name in wanted}
    except DamagedError as problem:
        raise WeightsError(f"{path}: refused, {problem}; save it with MATLAB again") from problem
    except Exception as problem:  # whatever a damaged file makes of HDF5's readers
        raise WeightsError(f"{path}: not a whole MATLAB v7.3 file ({problem}); copy it again") from problem


class Tree:
    """The parts of one open file, counted as they are read."""

    def __init__(self, h5py: Any, file: Any) -> None:
        self.h5py, self.file = h5py, file
        self.parts = self.bytes = 0

    def child(self, group: Any, name: str, depth: int) -> Any:
        """Return the value of *name* in *group*; only hard links are followed."""
        link = group.get(name, getlink=True)
        if not isinstance(link, self.h5py.HardLink):
            raise DamagedError(f"{name} is a link to elsewhere")
        return self.value(group[name], depth)

    def value(self, part: Any, depth: int) -> Any:
        """Return the value of a group or dataset."""
        self.parts += 1
        if depth > DEEPEST or self.parts > MOST_PARTS:
            raise DamagedError(f"nested deeper than {DEEPEST} or of more than {MOST_PARTS} parts")
        if isinstance(part, self.h5py.Group):
            return self.struct(part, depth)
        if not isinstance(part, self.h5py.Dataset):
            return None
        if part.is_virtual or part.external:
            raise DamagedError(f"{part.name} has its numbers in another file")
        kind = part.attrs.get(CLASS, b"")
        kind = kind.decode("latin-1") if isinstance(kind, bytes) else str(kind)
        if part.attrs.get(EMPTY):
            return {"char": "", "cell": [], "struct": []}.get(kind, np.zeros((0, 0)))
        if part.dtype.kind == "O":
            return self.references(part, depth)
        return self.numbers(part, kind)

    def struct(self, group: Any, depth: int) -> Any:
        """Return a dict, or a list of dicts where every field is an array of references."""
        fields = {name: self.child(group, name, depth + 1) for name in group if name not in NOT_READ}
        arrays = [self.is_array_of_structs(group[name]) for name in fields]
        if not arrays or not all(arrays):
            return fields
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]

    def is_array_of_structs(self, part: Any) -> bool:
        """Say whether *part* is a field of an array of structs: references that are no cell."""
        return isinstance(part, self.h5py.Dataset) and part.dtype.kind == "O" and CLASS not in part.attrs

    def references(self, part: Any, depth: int) -> list[Any]:
        """Return what a cell or a field of an array of structs refers to, in MATLAB's order."""
        if self.h5py.check_ref_dtype(part.dtype) is not self.h5py.Reference:
            raise DamagedError(f"{part.name} holds objects")
        self.account(part)
        return [
            self.value(self.file[reference], depth + 1) if reference else None for reference in part[()].flat
        ]

    def numbers(self, part: Any, kind: str) -> Any:
        """Return text or an array with MATLAB's axes; `None` where it is neither."""
        if part.dtype.kind not in "fiu":
            return None
        self.account(part)
        array = np.asarray(part[()]).T
        if kind == "char":
            return array.astype("<u2").tobytes(order="F").decode("utf-16-le")
        return array

    def account(self, part: Any) -> None:
        """Refuse numbers that are too many in all; compressed, they need little room in the file."""
        self.bytes += math.prod(part.shape) * part.dtype.itemsize
        if self.bytes > MOST_BYTES:
            raise DamagedError(f"more than {MOST_BYTES >> 30} GiB after decompression")
