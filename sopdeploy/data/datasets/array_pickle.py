"""Restricted reader of pickled dictionaries of NumPy arrays.

A pickle can call any function that it names. This unpickler accepts only the names that NumPy writes, and
maps them to the classes of this module, because NumPy's own classes accept states that corrupt memory.
"""

import io
import pickle  # restricted by find_class
from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.errors import DataError


class _Dtype:
    def __init__(self, name: str | bytes, *_: Any) -> None:
        name = name.decode("latin-1") if isinstance(name, bytes) else name
        if name not in {"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"}:
            raise pickle.UnpicklingError(f"dtype {name[:20]!r} is not numeric")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        order: Any = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if min(shape, default=0) < 0:  # reshape would infer the size
            raise pickle.UnpicklingError("negative array size")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _frombuffer(data: Any, dtype: _Dtype, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order in {"F", b"F"}, bytes(data)))
    return array


def _encode(text: str, encoding: Any) -> bytes:
    if encoding not in {"latin1", "latin-1", b"latin1", b"latin-1"}:
        raise pickle.UnpicklingError("unknown text encoding")
    return text.encode("latin-1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module[:40]}.{name[:40]}")
        return ALLOWED[module, name]


def read_array_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of numeric arrays, lists of integers, text and numbers.

    Raises `DataError` if the file is damaged or holds anything else. No code of the file is run.
    """
    try:
        content = {}
        loaded = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        for key, value in loaded.items():
            name = key.decode("latin-1") if isinstance(key, bytes) else str(key)
            integers = isinstance(value, list) and all(isinstance(item, int) for item in value)
            if isinstance(value, _Array) and value.array is not None:
                content[name] = value.array
            elif integers or isinstance(value, bytes | str | int | float):
                content[name] = value
            else:
                raise pickle.UnpicklingError(f"unsupported value of type {type(value).__name__}")
        return content
    except Exception as error:  # a hostile file can make the unpickler raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: refused, not a pickle of arrays ({reason}); use the official file"
        ) from error
