"""Reads pickles of dictionaries with lists and NumPy arrays, and nothing else.

A pickle is a program: it may name any function of the machine and have it called. Here every name but those
that NumPy writes into its arrays is refused, and those stand for the plain classes below, so that not even
NumPy's own reconstruction sees a stranger's values.
"""

import io
import math
import pickle  # only as the reader of the opcodes, with every name replaced
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import DataError

NUMBERS = {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8", "b1"}
MODULES = ("numpy.core", "numpy._core")  # before NumPy 2 and since


class RefusedError(Exception):
    """The pickle holds what no file of pictures needs."""


class KindOfNumber:
    """Stands for `numpy.dtype`: the name of a kind of number, and the order of its bytes."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = text_of(name)
        if self.name not in NUMBERS:
            raise RefusedError(f"numbers of kind {self.name[:20]!r}")
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = text_of(state[1])
        if self.order not in {"<", ">", "|", "="}:
            raise RefusedError("an unknown order of bytes")

    def dtype(self) -> np.dtype[Any]:
        """Return the type that NumPy calls so."""
        return np.dtype(self.order + self.name)


class StoredArray:
    """Stands for an array under way; `array` is there once its state was read."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, by_columns, data = state
        if not isinstance(kind, KindOfNumber) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise RefusedError("an array that is none of numbers")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise RefusedError("an array of an impossible shape")
        if math.prod(shape) * kind.dtype().itemsize != len(data):
            raise RefusedError("an array whose shape and bytes disagree")
        flat = np.frombuffer(data, dtype=kind.dtype())
        self.array = flat.reshape(shape, order="F" if by_columns else "C")


def array_of_buffer(data: Any, kind: Any, shape: Any, order: Any) -> StoredArray:
    """Stand for the function with which the fifth version of pickles makes arrays."""
    found = StoredArray()
    found.__setstate__((1, shape, kind, text_of(order) == "F", bytes(data)))
    return found


def encoded(text: Any, encoding: Any) -> bytes:
    """Stand for `codecs.encode`, with which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or text_of(encoding) not in {"latin1", "latin-1"}:
        raise RefusedError("bytes in an unknown form")
    return text.encode("latin-1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): encoded,
    ("numpy", "dtype"): KindOfNumber,
    ("numpy", "ndarray"): StoredArray,
    **{(f"{module}.multiarray", "_reconstruct"): StoredArray for module in MODULES},
    **{(f"{module}.numeric", "_frombuffer"): array_of_buffer for module in MODULES},
}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in `STAND_INS` only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; raises `RefusedError` for every other."""
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise RefusedError(f"the name {module[:40]}.{name[:40]}") from None


def read_array_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in the pickle at *path*, with plain lists, numbers, text and arrays.

    Raises `DataError` where it cannot be read, is damaged or holds anything else; nothing in it is run.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}); give a file you may read") from problem
    try:
        values = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(values, dict):
            raise RefusedError("no dictionary")
        return {text_of(key): plain(value) for key, value in values.items()}
    except RefusedError as problem:
        raise DataError(f"{path}: refused, it holds {problem}; use the official file") from problem
    except (MemoryError, RecursionError):
        raise DataError(f"{path}: refused, reading it needs too much memory; use the official file") from None
    except Exception as problem:  # whatever a damaged file makes of the reader
        raise DataError(f"{path}: not a whole pickle of pictures ({problem}); copy it again") from problem


def text_of(value: Any) -> str:
    """Return text, which Python 2 wrote as bytes; raises `RefusedError` for anything else."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, str):
        return value
    raise RefusedError("something else where text belongs")


def plain(value: Any) -> Any:
    """Return *value* as a caller may use it; raises `RefusedError` for what is neither number nor array."""
    if isinstance(value, StoredArray):
        if value.array is None:
            raise RefusedError("an array without its numbers")
        return value.array
    if isinstance(value, list):
        if not all(isinstance(item, int) for item in value):
            raise RefusedError("a list of something else than whole numbers")
        return value
    if isinstance(value, bytes | str | int | float):
        return value
    raise RefusedError(f"a value of type {type(value).__name__}")
