"""Pickles of pictures from strangers: nothing in them runs, and whatever they hold ends in one line."""

import contextlib
import os
import pickle  # noqa: TID251  # to write what an attacker would
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
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(DataError) as problem:
        read_array_pickle(path)
    assert "\n" not in str(problem.value)
    assert str(path) in str(problem.value)
    return str(problem.value)


MALICE = {
    "a command": lambda marker: Calls(os.system, f"touch {marker}"),
    "an evaluation": lambda marker: Calls(eval, f"open('{marker}', 'w')"),
    "a file": lambda marker: Calls(open, str(marker), "w"),
    "a nested one": lambda marker: {"data": [1, {"labels": Calls(os.system, f"touch {marker}")}]},
    "numpy's own loader": lambda marker: Calls(np.load, str(marker)),
    "an array of numpy's": lambda marker: Calls(np.array, [1]),
    "a class": lambda marker: {"data": Path(marker)},
    "compression": lambda marker: Calls(zlib.decompress, zlib.compress(b"0" * 100)),
}


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", MALICE)
def test_a_pickle_that_names_anything_is_refused_and_runs_nothing(tmp_path, name, protocol) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps(MALICE[name](marker), protocol=protocol)
    assert "refused, it holds the name" in refused(tmp_path / "val_data", data)
    assert not marker.exists()


def test_the_name_that_is_refused_is_told(tmp_path) -> None:
    message = refused(tmp_path / "val_data", pickle.dumps({"data": Calls(os.system, "true")}))
    assert "refused, it holds the name posix.system; use the official file" in message


ARRAYS = {
    "objects": np.array([1, "a", None], dtype=object),
    "text": np.array(["a", "b"]),
    "fields": np.zeros(3, dtype=[("a", "u1"), ("b", "f4")]),
    "complex numbers": np.zeros(3, dtype=complex),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_anything_but_numbers_is_refused(tmp_path, name) -> None:
    assert "refused" in refused(tmp_path / "val_data", pickle.dumps({"data": ARRAYS[name]}))


def forged(shape: tuple[int, ...], data: bytes) -> bytes:
    """Return the pickle of an array whose shape is not that of its bytes."""
    honest = pickle.dumps({"data": np.zeros((1, 251), dtype=np.uint8)}, protocol=2)
    lie = pickle.dumps(shape, protocol=2)[2:-1]
    return honest.replace(pickle.dumps((1, 251), protocol=2)[2:-1].split(b"q")[0], lie.split(b"q")[0])


@pytest.mark.parametrize("shape", [(1, 252), (2**15, 2**14), (0, 0)])
def test_a_shape_that_its_bytes_do_not_fill_is_refused(tmp_path, shape) -> None:
    assert "shape and bytes disagree" in refused(tmp_path / "val_data", forged(shape, b""))


def test_a_list_of_anything_but_whole_numbers_is_refused(tmp_path) -> None:
    assert "a list of something else" in refused(tmp_path / "x", pickle.dumps({"labels": [1, 2.5]}))
    assert "no dictionary" in refused(tmp_path / "x", pickle.dumps([1, 2]))
    assert "a value of type set" in refused(tmp_path / "x", pickle.dumps({"labels": {1}}, protocol=5))


def test_a_claim_of_terabytes_costs_nothing(tmp_path) -> None:
    claim = b"\x80\x04\x8e" + struct.pack("<Q", 2**42)
    assert refused(tmp_path / "val_data", claim)
    assert refused(tmp_path / "val_data", b"\x80\x04r\xff\xff\xff\x7f")


@pytest.mark.filterwarnings("ignore")
@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_a_table_or_one_line(tmp_path_factory, data) -> None:
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
    ids=["bytes", "by columns", "big end first"],
)
def test_what_numpy_writes_is_read_as_it_was(tmp_path, array, protocol) -> None:
    path = tmp_path / "val_data"
    path.write_bytes(pickle.dumps({"data": array, "labels": [1, 2]}, protocol=protocol))
    found = read_array_pickle(path)
    assert np.array_equal(found["data"], array)
    assert found["labels"] == [1, 2]
