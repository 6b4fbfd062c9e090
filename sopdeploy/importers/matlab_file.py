"""Readers of MATLAB files: versions 5 to 7 with scipy, version 7.3 (HDF5) with h5py.

scipy trusts the sizes in a file: wrong ones crash the process or exhaust its memory. The structure of version
5 files is therefore checked before scipy sees them. Reference: "MAT-File Format" (MathWorks), chapter 1.
"""

import io
import math
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.environment import import_optional
from sopdeploy.errors import WeightsError

VARIABLES = ("net", "params", "layers", "meta")
MAX_DEPTH = 32
MAX_PARTS = 200_000
MAX_BYTES = 2 << 30

HEADERS = {b"IM": ("<", b"\x00\x01IM"), b"MI": (">", b"\x01\x00MI")}
HEADER_SIZE = 128
PEEK = 4096  # enough for the name of a compressed variable
MATRIX, COMPRESSED = 14, 15  # element types
INT8, INT32, UINT32, UTF8 = 1, 5, 6, 16
VALUE_TYPES = {1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18}
CELL, STRUCT = 1, 2  # array classes
VALUE_CLASSES = {4, *range(6, 16)}  # text and numbers
COMPLEX = 0x0800


class DamagedError(Exception):
    """A file violates its format or exceeds a limit."""


def read_v5(path: Path, wanted: Collection[str] = VARIABLES) -> dict[str, Any]:
    """Read the *wanted* variables of a MATLAB file of version 5 to 7; raises `WeightsError`.

    A struct becomes a dict, a struct array a list of dicts, a cell a list, text a `str`, a real array a NumPy
    array with MATLAB's axes, anything else None. Objects, function handles and sparse matrices are refused.
    """
    scipy_io = import_optional("scipy.io", "scipy", "sopdeploy[import]", WeightsError, str(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DamagedError(f"more than {MAX_BYTES >> 30} GiB")
        content = scipy_io.loadmat(io.BytesIO(_checked_v5(path.read_bytes(), wanted)))
        return {name: _plain_value(content[name]) for name in wanted if name in content}
    except Exception as error:  # scipy raises many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path}: damaged MATLAB file ({reason}); copy it again") from error


def _checked_v5(content: bytes, wanted: Collection[str]) -> bytes:
    """Build a MATLAB file with only the *wanted* variables of *content*, checked and decompressed."""
    if content[126:HEADER_SIZE] not in HEADERS:
        raise DamagedError("its header has no byte order")
    byte_order, version = HEADERS[content[126:HEADER_SIZE]]
    left = MAX_BYTES
    variables: dict[str, bytes | memoryview] = {}
    for kind, data in _elements(memoryview(content)[HEADER_SIZE:], byte_order):
        if kind == COMPRESSED:
            start = memoryview(zlib.decompressobj().decompress(data[:PEEK], PEEK))
            if _matrix_name(start[8:], byte_order) not in wanted:
                continue
            inflate = zlib.decompressobj()
            plain = memoryview(inflate.decompress(data, left))
            if not inflate.eof and inflate.unconsumed_tail:
                raise DamagedError(f"more than {MAX_BYTES >> 30} GiB after decompression")
            kind, data = next(_elements(plain, byte_order), (0, plain))
        left -= len(data)
        if kind == MATRIX and (name := _matrix_name(data, byte_order)) in wanted:
            _check_matrix(data, byte_order)
            variables[name] = struct.pack(f"{byte_order}II", MATRIX, len(data)) + data
    return b"".join([b"MATLAB 5.0 MAT-file".ljust(124), version, *variables.values()])


def _elements(data: memoryview, byte_order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield type and content of the tagged elements in *data*; up to four bytes are stored inside the tag."""
    position = 0
    while len(data) - position >= 8:
        kind, size = struct.unpack_from(f"{byte_order}II", data, position)
        start, step = position + 8, 8 + size + (-size % 8 if kind != COMPRESSED else 0)
        if kind >> 16:
            kind, size, start, step = kind & 0xFFFF, kind >> 16, position + 4, 8
        if start + size > len(data):
            raise DamagedError("it ends too early")
        yield kind, data[start : start + size]
        position += step


def _matrix_name(matrix: memoryview, byte_order: str) -> str:
    return bytes(next(islice(_elements(matrix, byte_order), 2, None), (0, b""))[1]).decode("latin-1")


def _check_matrix(variable: memoryview, byte_order: str) -> None:
    """Raise `DamagedError` if a nested matrix contradicts its header or exceeds a limit."""
    stack = [(variable, 0)]
    parts = 0
    while stack:
        matrix, depth = stack.pop()
        if not matrix:
            continue
        elements = _elements(matrix, byte_order)
        kind, complex_parts, count = _read_header(elements, byte_order)
        if kind in {CELL, STRUCT}:
            parts += count
            if depth >= MAX_DEPTH or parts > MAX_PARTS:
                raise DamagedError(f"nested deeper than {MAX_DEPTH} or more than {MAX_PARTS} parts")
            children = list(islice(elements, count + 1))
            if [child[0] for child in children] != [MATRIX] * count:
                raise DamagedError("a cell or struct with other parts than it declares")
            stack += [(child, depth + 1) for _, child in children]
        elif kind in VALUE_CLASSES:
            stored = list(islice(elements, 3))
            if len(stored) != complex_parts or any(element[0] not in VALUE_TYPES for element in stored):
                raise DamagedError("values of an unknown type")
            if count > len(matrix):
                raise DamagedError("an array with more values than bytes")
        else:
            raise DamagedError(
                f"an object, function handle or sparse matrix (class {kind}); save plain arrays"
            )


def _read_header(elements: Iterator[tuple[int, memoryview]], byte_order: str) -> tuple[int, int, int]:
    """Read the array class, the number of value elements and the number of entries of a matrix.

    The entries of a struct are counted for each of its fields.
    """
    kinds, contents = zip(*islice(elements, 3), strict=True)
    if kinds[0] != UINT32 or kinds[1] not in {INT32, UINT32} or kinds[2] not in {INT8, UTF8}:
        raise DamagedError("a matrix without class, sizes or name")
    flags, sizes = (
        np.frombuffer(contents[0], f"{byte_order}u4"),
        np.frombuffer(contents[1], f"{byte_order}i4").tolist(),
    )
    if len(flags) != 2 or not 2 <= len(sizes) <= 32 or min(sizes) < 0:
        raise DamagedError("a matrix without class or sizes")
    kind, count = int(flags[0]) & 0xFF, math.prod(sizes)
    if kind == STRUCT:
        (width_kind, width), (names_kind, names) = islice(elements, 2)
        length = int(struct.unpack(f"{byte_order}i", width)[0])
        if (width_kind, names_kind) != (INT32, INT8) or length < 1 or len(names) % length:
            raise DamagedError("a struct whose fields have no names")
        count *= len(names) // length
    return kind, 2 if flags[0] & COMPLEX else 1, count


def _plain_value(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind == "c":
        return None
    if value.dtype.names:
        fields = value.dtype.names
        records = [{name: _plain_value(item[name]) for name in fields} for item in value.ravel(order="F")]
        return records[0] if len(records) == 1 else records
    if value.dtype.kind == "O":
        return [_plain_value(item) for item in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return "".join(value.ravel().tolist())
    return value.astype("u1") if value.dtype.kind == "b" else value


MATLAB_CLASS, MATLAB_EMPTY = "MATLAB_class", "MATLAB_empty"
SKIPPED_FIELDS = {"vars", "inputs", "outputs", "learningRate", "weightDecay", "trainOpts"}  # not read


def read_hdf5(path: Path) -> dict[str, Any]:
    """Read the variables in `VARIABLES` of a MATLAB 7.3 file as `read_v5` does; raises `WeightsError`."""
    h5py = import_optional("h5py", "h5py", "sopdeploy[import]", WeightsError, str(path))
    try:
        with h5py.File(path, "r") as file:
            reader = _Hdf5Reader(h5py, file)
            return {name: reader.read_member(file, name, 0) for name in file if name in VARIABLES}
    except DamagedError as error:
        raise WeightsError(f"{path}: refused, {error}; save it with MATLAB again") from error
    except Exception as error:  # h5py raises many types for damaged files
        raise WeightsError(f"{path}: damaged MATLAB v7.3 file ({error}); copy it again") from error


@dataclass
class _Hdf5Reader:
    """Reads groups and datasets of one file and counts their parts and bytes."""

    h5py: Any
    file: Any
    parts: int = 0
    bytes: int = 0

    def read_member(self, group: Any, name: str, depth: int) -> Any:
        if not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
            raise DamagedError(f"{name} is a link to another place")
        return self._read(group[name], depth)

    def _read(self, part: Any, depth: int) -> Any:
        self.parts += 1
        if depth > MAX_DEPTH or self.parts > MAX_PARTS:
            raise DamagedError(f"nested deeper than {MAX_DEPTH} or more than {MAX_PARTS} parts")
        if isinstance(part, self.h5py.Group):
            return self._read_struct(part, depth)
        if not isinstance(part, self.h5py.Dataset):
            return None
        if part.is_virtual or part.external:
            raise DamagedError(f"{part.name} stores its values in another file")
        kind = part.attrs.get(MATLAB_CLASS, b"")
        kind = kind.decode("latin-1") if isinstance(kind, bytes) else str(kind)
        if part.attrs.get(MATLAB_EMPTY):
            return {"char": "", "cell": [], "struct": []}.get(kind, np.zeros((0, 0)))
        if part.dtype.kind not in "fiuO":
            return None
        if part.dtype.kind == "O" and self.h5py.check_ref_dtype(part.dtype) is not self.h5py.Reference:
            raise DamagedError(f"{part.name} holds objects")
        self.bytes += math.prod(part.shape) * part.dtype.itemsize
        if self.bytes > MAX_BYTES:
            raise DamagedError(f"more than {MAX_BYTES >> 30} GiB after decompression")
        if part.dtype.kind == "O":
            return [self._read(self.file[ref], depth + 1) if ref else None for ref in part[()].flat]
        array = np.asarray(part[()]).T
        return array.astype("<u2").tobytes(order="F").decode("utf-16-le") if kind == "char" else array

    def _read_struct(self, group: Any, depth: int) -> Any:
        """Read a dict, or a list of dicts if every field is an array of references that is not a cell."""
        fields = {
            name: self.read_member(group, name, depth + 1) for name in group if name not in SKIPPED_FIELDS
        }
        members = [group[name] for name in fields]
        is_array = bool(members) and all(
            isinstance(part, self.h5py.Dataset) and part.dtype.kind == "O" and MATLAB_CLASS not in part.attrs
            for part in members
        )
        if not is_array:
            return fields
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
