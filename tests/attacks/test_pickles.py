"""Untrusted pickles of images: no code runs, and anything but arrays ends in a one-line error."""

import contextlib
import os
import pickle  # noqa: TID251  # to write hostile files
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.data.datasets.array_pickle import read_array_pickle
from sopdeploy.errors import DataError


class Calls:
    """Pickled as a call of *function*."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_array_pickle(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: refused, not a pickle of arrays (")
    return message


CALLS = {
    "command": lambda marker: Calls(os.system, f"touch {marker}"),
    "eval": lambda marker: Calls(eval, f"open('{marker}', 'w')"),
    "open": lambda marker: Calls(open, str(marker), "w"),
    "nested": lambda marker: {"data": [1, {"labels": Calls(os.system, f"touch {marker}")}]},
    "np.load": lambda marker: Calls(np.load, str(marker)),
    "np.array": lambda marker: Calls(np.array, [1]),
    "class": lambda marker: {"data": Path(marker)},
    "decompression": lambda marker: Calls(zlib.decompress, zlib.compress(b"0" * 100)),
}


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_refers_to_other_names_is_refused_and_runs_nothing(tmp_path, name, protocol) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps(CALLS[name](marker), protocol=protocol)
    assert "it refers to" in refused(tmp_path / "val_data", data)
    assert not marker.exists()


HONEST = pickle.dumps({"data": np.zeros((1, 251), dtype=np.uint8)}, protocol=2)


def with_shape(shape: tuple[int, ...]) -> bytes:
    """Forge the pickle of an array whose shape does not match its bytes."""
    old, new = (pickle.dumps(value, protocol=2)[2:-1].split(b"q")[0] for value in ((1, 251), shape))
    return HONEST.replace(old, new)


BAD_CONTENT = {
    "objects": ({"data": np.array([1, "a", None], dtype=object)}, "dtype 'O8' is not numeric"),
    "text array": ({"data": np.array(["a", "b"])}, "dtype 'U1' is not numeric"),
    "fields": ({"data": np.zeros(3, dtype=[("a", "u1"), ("b", "f4")])}, "dtype 'V5' is not numeric"),
    "complex": ({"data": np.zeros(3, dtype=complex)}, "dtype 'c16' is not numeric"),
    "list of floats": ({"labels": [1, 2.5]}, "unsupported value of type list"),
    "set": ({"labels": {1}}, "unsupported value of type"),
    "no dictionary": ([1, 2], "'list' object has no attribute 'items'"),
    "named call": ({"data": Calls(os.system, "true")}, "it refers to posix.system"),
    "larger shape": (with_shape((1, 252)), "cannot reshape"),
    "huge shape": (with_shape((2**15, 2**14)), "cannot reshape"),
    "empty shape": (with_shape((0, 0)), "cannot reshape"),
    "inferred shape": (with_shape((1, -1)), "negative array size"),
    "terabytes of text": (b"\x80\x04\x8e" + struct.pack("<Q", 2**42), "refused"),
    "a huge memo": (b"\x80\x04r\xff\xff\xff\x7f", "refused"),
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_anything_but_a_dictionary_of_numbers_and_numeric_arrays_is_refused(tmp_path, name) -> None:
    content, message = BAD_CONTENT[name]
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=5)
    assert message in refused(tmp_path / "val_data", data)


@pytest.mark.filterwarnings("ignore")
@given(st.binary(max_size=200))
def test_random_bytes_give_a_dictionary_or_one_line(tmp_path_factory, data) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(b"\x80\x04" + data)
    with contextlib.suppress(DataError):
        assert isinstance(read_array_pickle(path), dict)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 12),
        np.asfortranarray(np.arange(24, dtype=np.float64).reshape(2, 12)),
        np.arange(5, dtype=">i4"),
    ],
    ids=["uint8", "column-major", "big-endian"],
)
def test_arrays_written_by_numpy_are_read_unchanged(tmp_path, array, protocol) -> None:
    path = tmp_path / "val_data"
    path.write_bytes(pickle.dumps({"data": array, "labels": [1, 2]}, protocol=protocol))
    found = read_array_pickle(path)
    assert np.array_equal(found["data"], array)
    assert found["labels"] == [1, 2]
