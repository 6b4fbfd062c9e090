"""MATLAB's own format, versions 5 to 7: numbers, text, cells and structs, and nothing else of it.

Reference: "MAT-File Format" (MathWorks), chapter 1. A file is a row of tagged elements; from version 7 on
each is compressed. Objects, function handles, sparse and complex matrices are stepped over, never built.
Written out here because ready-made readers follow nested cells as deep as a file says, and crash.
"""

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.environment import import_optional
from sopdeploy.errors import WeightsError

HEADER = 128
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, CHARACTERS = 1, 2, 4
NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
COMPLEX = 0x0800
DEEPEST = 32
MOST_PARTS = 200_000
MOST_BYTES = 2 << 30
PEEK = 4096  # enough for the name of a variable
VARIABLES = ("net", "params", "layers", "meta")


class DamagedError(Exception):
    """The bytes are not what the format says."""


def read_v5(path: Path, wanted: Collection[str] = VARIABLES) -> dict[str, Any]:
    """Return the *wanted* variables of the file at *path*; raises `WeightsError`.

    A struct is a dict, an array of structs a list of dicts, a cell a list, text a `str`, numbers an array
    with MATLAB's axes; what is none of these is `None`.
    """
    try:
        content = path.read_bytes()
        return dict(variables(content, wanted))
    except (DamagedError, struct.error, ValueError, zlib.error, UnicodeDecodeError) as problem:
        raise WeightsError(f"{path}: not a whole MATLAB file ({problem}); copy it again") from problem
    except (OSError, MemoryError) as problem:
        raise WeightsError(f"{path}: cannot be read ({problem})") from problem


def variables(content: bytes, wanted: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each *wanted* variable; others are not even decompressed."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:HEADER])
    if order is None:
        raise DamagedError("its header has no byte order")
    elements = Elements(memoryview(content)[HEADER:], order)
    left = MOST_BYTES
    while elements.left():
        kind, data = elements.take()
        if kind == COMPRESSED:
            if peeked_name(data, order) not in wanted:
                continue
            data = memoryview(decompressed(data, left))
            kind, data = Elements(data, order).take()
        left -= len(data)
        if kind == MATRIX and (name := name_of(Elements(data, order))) in wanted:
            yield name, Matrices().value(Elements(data, order))


def decompressed(data: memoryview, limit: int) -> bytes:
    """Return what *data* decompresses to, of at most *limit* bytes."""
    inflate = zlib.decompressobj()
    plain = inflate.decompress(data, limit)
    if not inflate.eof and inflate.unconsumed_tail:
        raise DamagedError(f"more than {MOST_BYTES >> 30} GiB after decompression")
    return plain


def peeked_name(data: memoryview, order: str) -> str:
    """Return the name of a compressed variable from its first bytes."""
    start = memoryview(zlib.decompressobj().decompress(data[:PEEK], PEEK))
    return name_of(Elements(start[8:], order))


class Elements:
    """A row of tagged elements."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data, self.order, self.at = data, order, 0

    def left(self) -> bool:
        """Say whether there is another element."""
        return len(self.data) - self.at >= 8

    def take(self) -> tuple[int, memoryview]:
        """Return type and bytes of the next element; four bytes or fewer stand inside the tag."""
        first, size = struct.unpack_from(f"{self.order}II", self.data, self.at)
        begin, kind, step = self.at + 8, first, 8 + size + (-size % 8 if first != COMPRESSED else 0)
        if first >> 16:
            begin, kind, size, step = self.at + 4, first & 0xFFFF, first >> 16, 8
        if begin + size > len(self.data):
            raise DamagedError("it ends too early")
        self.at += step
        return kind, self.data[begin : begin + size]

    def numbers(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the next element as numbers of its own type."""
        kind, data = self.take()
        if kind not in NUMBERS:
            raise DamagedError(f"numbers of an unknown type {kind}")
        return np.frombuffer(data, dtype=f"{self.order}{NUMBERS[kind]}")


def head_of(elements: Elements) -> tuple[int, list[int], str]:
    """Take flags, sizes and name off the front of a matrix."""
    flags = elements.numbers()
    sizes = [int(size) for size in elements.numbers()]
    _, name = elements.take()
    if not len(flags) or len(sizes) < 2 or min(sizes) < 0:
        raise DamagedError("a matrix without class or sizes")
    return int(flags[0]), sizes, bytes(name).decode("latin-1")


def name_of(elements: Elements) -> str:
    """Return the name of a matrix."""
    return head_of(elements)[2]


class Matrices:
    """The values of one variable, counted as they are built."""

    def __init__(self) -> None:
        self.parts = 0

    def value(self, elements: Elements, depth: int = 0) -> Any:
        """Return the value of a matrix, `None` where it is of a kind that is not read."""
        if depth > DEEPEST:
            raise DamagedError(f"nested deeper than {DEEPEST}")
        if not elements.data:
            return np.zeros((0, 0))
        flags, sizes, _ = head_of(elements)
        kind = flags & 0xFF
        if kind == CELL:
            return [self.nested(elements, depth) for _ in range(math.prod(sizes))]
        if kind == STRUCT:
            return self.structs(elements, math.prod(sizes), depth)
        if kind == CHARACTERS:
            return text(elements)
        if kind in NUMERIC and not flags & COMPLEX:
            return elements.numbers().astype(NUMERIC[kind]).reshape(sizes, order="F")
        return None

    def nested(self, elements: Elements, depth: int) -> Any:
        """Return the next element, which has to be a matrix."""
        self.parts += 1
        if self.parts > MOST_PARTS:
            raise DamagedError(f"more than {MOST_PARTS} parts")
        kind, data = elements.take()
        if kind != MATRIX:
            raise DamagedError(f"an element of type {kind} where a matrix should be")
        return self.value(Elements(data, elements.order), depth + 1)

    def structs(self, elements: Elements, count: int, depth: int) -> dict[str, Any] | list[dict[str, Any]]:
        """Return one struct, or the list of an array of them."""
        widths = elements.numbers()
        _, names = elements.take()
        width = int(widths[0]) if len(widths) else 0
        if width < 1 or len(names) > MOST_PARTS or count > MOST_PARTS:
            raise DamagedError("a struct of too many fields, or whose fields have no names")
        starts = range(0, len(names), width)
        fields = [bytes(names[at : at + width]).split(b"\0")[0].decode("latin-1") for at in starts]
        found = [{field: self.nested(elements, depth) for field in fields} for _ in range(count)]
        return found[0] if count == 1 else found


def text(elements: Elements) -> str:
    """Return a row of characters."""
    kind, data = elements.take()
    if kind not in TEXT:
        raise DamagedError(f"text of an unknown type {kind}")
    if TEXT[kind] in {"utf-16", "utf-32"}:
        return bytes(data).decode(TEXT[kind] + ("-le" if elements.order == "<" else "-be"))
    return bytes(data).decode(TEXT[kind])


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
    h5py = import_optional("h5py", "h5py", "sopdeploy[import]", WeightsError, str(path))
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
