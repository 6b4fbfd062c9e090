"""MATLAB's two containers: what MATLAB itself wrote is read as others read it, damage is one line."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from sopdeploy.errors import WeightsError
from sopdeploy.importers.matconvnet import average_colour, read_dagnn
from sopdeploy.importers.matlab_file import read_v5
from sopdeploy.importers.weight_files import open_weights

SAMPLES = sorted((Path(scipy.io.matlab.__file__).parent / "tests" / "data").glob("test*_7.*GLNX86.mat"))


@pytest.mark.skipif(not SAMPLES, reason="this scipy was installed without its sample files")
def test_files_that_matlab_wrote_are_read_as_scipy_reads_them() -> None:
    compared = 0
    for sample in SAMPLES:
        if "hdf5" in sample.name:
            continue
        theirs = {
            name: value for name, value in scipy.io.loadmat(sample).items() if not name.startswith("__")
        }
        ours = read_v5(sample, theirs.keys())
        for name, value in theirs.items():
            if isinstance(ours[name], np.ndarray):
                np.testing.assert_array_equal(ours[name], value, err_msg=sample.name)
                compared += 1
            elif isinstance(ours[name], str) and len(value) == 1:
                assert ours[name] == value[0]
                compared += 1
    assert compared >= 10


@pytest.mark.parametrize("compressed", [True, False])
def test_structs_cells_and_text(tmp_path: Path, compressed: bool) -> None:
    records = np.empty((1, 2), dtype=[("name", object), ("value", object)])
    records["name"][0] = "first", "zweite, ü"
    records["value"][0] = np.float32([[1, 2]]), np.uint8([[3]])
    cells = np.empty((1, 2), dtype=object)
    cells[0] = "x", np.zeros((0, 0))
    values = {"net": {"records": records, "cells": cells, "one": {"two": 2.0}, "none": {}}, "other": 1.0}
    scipy.io.savemat(tmp_path / "a.mat", values, do_compression=compressed)
    found = read_v5(tmp_path / "a.mat")
    assert found.keys() == {"net"}
    net = found["net"]
    assert [record["name"] for record in net["records"]] == ["first", "zweite, ü"]
    assert net["records"][0]["value"].tolist() == [[1, 2]]
    assert net["records"][0]["value"].dtype == np.float32
    assert (net["cells"][0], net["cells"][1].size, net["one"]["two"].tolist()) == ("x", 0, [[2.0]])


def test_what_is_no_real_number_is_not_read(tmp_path: Path) -> None:
    values = {"net": {"complex": np.array([[1 + 2j]]), "sparse": scipy.sparse.eye(3).tocsc()}}
    scipy.io.savemat(tmp_path / "a.mat", values)
    assert read_v5(tmp_path / "a.mat")["net"] == {"complex": None, "sparse": None}


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(kind: int, sizes: tuple[int, ...], name: bytes, rest: bytes) -> bytes:
    flags, dims = element(6, struct.pack("<II", kind, 0)), element(5, struct.pack(f"<{len(sizes)}i", *sizes))
    return element(14, flags + dims + element(1, name) + rest)


NUMBER = matrix(6, (1, 1), b"", element(9, struct.pack("<d", 1.0)))


def nested(depth: int) -> bytes:
    parts, size = [], len(NUMBER)
    head = matrix(1, (1, 1), b"", b"")[8:]
    for _ in range(depth):
        size += len(head)
        parts.append(struct.pack("<II", 14, size) + head)
        size += 8
    return b"".join(reversed(parts)) + NUMBER


WIDE = matrix(1, (300_000, 1), b"net", struct.pack("<II", 14, 0) * 300_000)
FIELDS = element(5, struct.pack("<i", 1)) + element(1, b"a" * 300_000)
DAMAGED = {
    "cut short": (matrix(6, (9, 9), b"net", element(9, b"12345678")), "cannot reshape"),
    "longer than the file": (struct.pack("<II", 14, 1 << 20), "it ends too early"),
    "deep": (matrix(1, (1, 1), b"net", nested(5000)), "nested deeper than 32"),
    "wide": (WIDE, "more than 200000 parts"),
    "many fields": (matrix(2, (1, 1), b"net", FIELDS), "too many fields"),
    "huge": (matrix(1, (2**31 - 1, 2**31 - 1), b"net", b""), "not a whole MATLAB file"),
    "negative": (matrix(6, (-1, 4), b"net", b""), "without class or sizes"),
    "not a matrix in a cell": (
        matrix(1, (1, 1), b"net", element(9, b"12345678")),
        "where a matrix should be",
    ),
    "an unknown type": (matrix(6, (1, 1), b"net", element(77, b"12345678")), "unknown type 77"),
    "text of an unknown type": (matrix(4, (1, 1), b"net", element(77, b"12345678")), "unknown type 77"),
    "not compressed": (struct.pack("<II", 15, 8) + b"12345678", "not a whole MATLAB file"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, what: str) -> None:
    body, said = DAMAGED[what]
    file = tmp_path / "a.mat"
    file.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + body)
    with pytest.raises(WeightsError, match=said):
        open_weights(file)


def test_what_decompresses_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sopdeploy.importers.matlab_file.MOST_BYTES", 1 << 20)
    data = zlib.compress(matrix(9, (1 << 22, 1), b"net", element(2, bytes(1 << 22))))
    file = tmp_path / "a.mat"
    body = struct.pack("<II", 15, len(data)) + data
    file.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + body)
    with pytest.raises(WeightsError, match="GiB after decompression"):
        open_weights(file)


def test_a_file_without_byte_order_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(200))
    with pytest.raises(WeightsError, match="no byte order"):
        open_weights(tmp_path / "a.mat")


PARAM = {"name": "a", "value": np.ones((2, 2))}
LAYER: dict[str, Any] = {"name": "l", "type": "dagnn.Conv", "block": {}}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "holds no MatConvNet network"),
        ({"net": {"layers": []}}, "holds no MatConvNet network"),
        ({"net": {"params": PARAM, "layers": []}}, "has no layers"),
        ({"net": {"params": PARAM, "layers": [{"name": "l"}]}}, "a layer has no name or type"),
        ({"net": {"params": {"value": 1}, "layers": [LAYER]}}, "a parameter has no name"),
        (
            {"net": {"params": {"name": "a", "value": None}, "layers": [LAYER]}},
            "parameter a holds no numbers",
        ),
        (
            {"net": {"params": {"name": "a", "value": np.zeros((0, 0))}, "layers": [LAYER]}},
            "holds no numbers",
        ),
    ],
)
def test_what_is_no_network_is_refused(variables: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        read_dagnn(Path("a.mat"), variables)


def test_a_network_may_lie_open_in_the_file() -> None:
    file = read_dagnn(Path("a.mat"), {"params": PARAM, "layers": LAYER, "meta": {}})
    assert (list(file.tensors), file.layers[0].kind, file.average, file.image_size) == (
        ["a"],
        "Conv",
        None,
        None,
    )


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1, 1, 3)])
def test_an_average_colour_of_any_shape(shape: tuple[int, ...]) -> None:
    assert average_colour(np.array([10.0, 20.0, 30.0]).reshape(shape)) == (10, 20, 30)


def test_an_average_picture_gives_its_mean_colour() -> None:
    picture = np.zeros((2, 2, 3))
    picture[0] = 10, 20, 30
    assert average_colour(picture) == (5, 10, 15)
