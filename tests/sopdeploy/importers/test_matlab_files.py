"""MATLAB files of both formats: files of MATLAB are read, damaged ones give one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from sopdeploy.errors import WeightsError
from sopdeploy.importers.matconvnet import read_dagnn
from sopdeploy.importers.weight_files import open_weights, read_v5

DATA = Path(scipy.io.matlab.__file__).parent / "tests" / "data"
needs_samples = pytest.mark.skipif(not DATA.is_dir(), reason="scipy was installed without its sample files")


@needs_samples
@pytest.mark.parametrize("kind", ["double", "matrix", "minus", "onechar", "string", "unicode"])
@pytest.mark.parametrize("version", ["7.1", "7.4"])
def test_arrays_and_text_of_matlab_are_read(kind: str, version: str) -> None:
    sample = DATA / f"test{kind}_{version}_GLNX86.mat"
    expected = scipy.io.loadmat(sample)[f"test{kind}"]
    found = read_v5(sample, {f"test{kind}"})[f"test{kind}"]
    assert found == expected[0] if isinstance(found, str) else np.array_equal(found, expected)


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


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"net": {"params": np.ones((40, 40))}})
    whole = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged MATLAB file") as error:
        open_weights(tmp_path / "a.mat")
    assert "\n" not in str(error.value)


PARAM = {"name": "a", "value": np.ones((2, 2))}
LAYER: dict[str, Any] = {"name": "l", "type": "dagnn.Conv", "block": {}}


COLOR = np.array([10.0, 20.0, 30.0])


@pytest.mark.parametrize("value", [COLOR[:, None], COLOR[None], COLOR[None, None], np.full((2, 2, 3), COLOR)])
def test_a_network_without_net_has_the_average_color_of_a_color_or_an_image(value: Any) -> None:
    variables = {"params": PARAM, "layers": LAYER, "meta": {"normalization": {"averageImage": value}}}
    file = read_dagnn(Path("a.mat"), "", variables)
    assert (list(file.tensors), file.layers["l"].kind) == (["a"], "Conv")
    assert (file.average_color, file.image_size) == ((10, 20, 30), None)
    assert read_dagnn(Path("a.mat"), "", variables | {"meta": {}}).average_color is None
