"""MATLAB files of both formats: files of MATLAB are read, damaged ones give one line."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from sopdeploy.errors import WeightsError
from sopdeploy.importers.matconvnet import read_dagnn
from sopdeploy.importers.matlab_file import read_v5
from sopdeploy.importers.weight_files import open_weights

DATA = Path(scipy.io.matlab.__file__).parent / "tests" / "data"
HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
needs_samples = pytest.mark.skipif(not DATA.is_dir(), reason="scipy was installed without its sample files")


@needs_samples
@pytest.mark.parametrize("kind", ["double", "matrix", "minus", "onechar", "string", "unicode"])
@pytest.mark.parametrize("version", ["7.1", "7.4"])
def test_arrays_and_text_of_matlab_are_read_and_other_types_refused(kind: str, version: str) -> None:
    sample = DATA / f"test{kind}_{version}_GLNX86.mat"
    expected = scipy.io.loadmat(sample)[f"test{kind}"]
    found = read_v5(sample, {f"test{kind}"})[f"test{kind}"]
    assert found == expected[0] if isinstance(found, str) else np.array_equal(found, expected)
    for refused in ("func", "object", "sparse"):
        with pytest.raises(WeightsError, match="an object, function handle or sparse matrix"):
            read_v5(DATA / f"test{refused}_7.4_GLNX86.mat", {f"test{refused}"})


@pytest.mark.parametrize("compressed", [True, False])
def test_structs_cells_and_text(tmp_path: Path, compressed: bool) -> None:
    records = np.empty((1, 2), dtype=[("name", object), ("value", object)])
    records["name"][0] = "first", "zweite, ü"
    records["value"][0] = np.float32([[1, 2]]), np.uint8([[3]])
    cells = np.empty((1, 2), dtype=object)
    cells[0] = "x", np.zeros((0, 0))
    net = {
        "records": records,
        "cells": cells,
        "one": {"two": 2.0},
        "none": {},
        "complex": np.array([[1 + 2j]]),
    }
    values = {"net": net, "other": 1.0}
    scipy.io.savemat(tmp_path / "a.mat", values, do_compression=compressed)
    found = read_v5(tmp_path / "a.mat")
    assert found.keys() == {"net"}
    net = found["net"]
    assert [record["name"] for record in net["records"]] == ["first", "zweite, ü"]
    assert net["records"][0]["value"].tolist() == [[1, 2]]
    assert net["records"][0]["value"].dtype == np.float32
    assert (net["cells"][0], net["cells"][1].size, net["one"]["two"].tolist()) == ("x", 0, [[2.0]])
    assert net["complex"] is None


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
HIDDEN = matrix(1, (1, 1), b"", b"") * 5000  # cells whose content lies behind them: scipy would nest them
DAMAGED = {
    "cut short": (matrix(6, (9, 9), b"net", element(9, b"12345678")), "more values than bytes|reshape"),
    "longer than the file": (struct.pack("<II", 14, 1 << 20), "it ends too early"),
    "deep": (matrix(1, (1, 1), b"net", nested(5000)), "nested deeper than 32"),
    "hidden depth": (matrix(1, (5000, 1), b"net", HIDDEN), "other parts than it declares"),
    "wide": (WIDE, "more than 200000 parts"),
    "huge cell": (matrix(1, (2**31 - 1, 2**31 - 1), b"net", b""), "more than 200000 parts"),
    "huge array": (matrix(6, (2**31 - 1, 1), b"net", element(9, b"12345678")), "more values than bytes"),
    "numbers of an unknown type": (matrix(6, (1, 1), b"net", element(77, b"12345678")), "unknown type"),
}


@pytest.mark.parametrize(("body", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, body: bytes, message: str) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(HEADER + body)
    with pytest.raises(WeightsError, match=message) as error:
        open_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_file_above_the_size_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr("sopdeploy.importers.matlab_file.MAX_BYTES", 1 << 20)
    body = matrix(9, (1 << 22, 1), b"net", element(2, bytes(1 << 22)))
    if compressed:
        data = zlib.compress(body)
        body = struct.pack("<II", 15, len(data)) + data
    (tmp_path / "a.mat").write_bytes(HEADER + body)
    with pytest.raises(WeightsError, match="more than 0 GiB" + " after decompression" * compressed):
        open_weights(tmp_path / "a.mat")


PARAM = {"name": "a", "value": np.ones((2, 2))}
LAYER: dict[str, Any] = {"name": "l", "type": "dagnn.Conv", "block": {}}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "holds no MatConvNet network"),
        ({"net": {"params": PARAM, "layers": []}}, "has no layers"),
        ({"net": {"params": {"value": 1}, "layers": [LAYER]}}, "a parameter has no name"),
    ],
)
def test_variables_without_a_network_are_refused(variables: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_dagnn(Path("a.mat"), variables)


COLOR = np.array([10.0, 20.0, 30.0])


@pytest.mark.parametrize("value", [COLOR[:, None], COLOR[None], COLOR[None, None], np.full((2, 2, 3), COLOR)])
def test_a_network_without_net_has_the_average_color_of_a_color_or_an_image(value: Any) -> None:
    variables = {"params": PARAM, "layers": LAYER, "meta": {"normalization": {"averageImage": value}}}
    file = read_dagnn(Path("a.mat"), variables)
    assert (list(file.tensors), file.layers[0].kind) == (["a"], "Conv")
    assert (file.average_color, file.image_size) == ((10, 20, 30), None)
    assert read_dagnn(Path("a.mat"), variables | {"meta": {}}).average_color is None
