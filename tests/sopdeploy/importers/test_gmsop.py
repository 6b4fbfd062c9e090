"""Imports of GM-SOP's MatConvNet files, in both MATLAB formats; released networks computed the logits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.importers.conversion import WeightFile, choose_config, fit_tensors
from sopdeploy.importers.gmsop import batch_norm, convert_gmsop, read_dagnn
from sopdeploy.importers.weight_files import open_weights, read_matlab
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import create_model
from tests.sopdeploy.importers.released import (
    AVERAGE,
    RELEASED,
    Net,
    assert_logits,
    imported,
    matconvnet,
    pixels,
    save_v7,
    save_v73,
)

NETWORKS = (
    "resnet18-64px",
    "srsop-resnet18",
    "gmgap-16-8-resnet18",
    "gmsop-16-8-resnet18",
    "gmsop-16-8-wrn36-2",
)

MEAN = torch.tensor(AVERAGE, dtype=torch.float64)[:, None, None]


def in_float64(path: Path, name: str) -> torch.nn.Module:
    """Build the network with the numbers of the file before they are rounded to float32."""
    file = open_weights(path)
    found = convert_gmsop(file, name)
    config = choose_config(file, found, name, {})
    expected = fit_tensors(file, found, name, config).keys()
    network = create_model(name, num_classes=found.num_classes, **config.model_dump()).double().eval()
    exact = {name: tensor for name, tensor in found.tensors.items() if name in expected}
    missing = network.load_state_dict(exact, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return network


def logits_of(released: str) -> torch.Tensor:
    return torch.tensor(RELEASED[released]["logits"], dtype=torch.float64)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("wrn" in name)) for name in NETWORKS]
)
@torch.no_grad()
def test_logits_are_equal_in_float64_and_close_in_float32(tmp_path: Path, name: str) -> None:
    save = save_v73 if name == "gmsop-16-8-resnet18" else partial(save_v7, compressed=True)
    file = save(tmp_path / "net.mat", matconvnet(name), dtype="f4")
    assert_logits(in_float64(file, name), logits_of(name), pixels())
    _, report = imported(file, name)
    second_order, wrn = "sop" in name, "wrn" in name
    expected = {"input_scaling": "raw", "conv5_stride": 1 if second_order else 2, "project_first_stage": wrn}
    if second_order:
        expected |= {"iterations": 3, "prenorm": "trace"}
    if "16-8" in name:
        expected |= {"chosen": 8, "components": 16, "balance_weight": 100.0, "dropout": 0.4 if wrn else 0.2}
        expected |= {"gate_norm": True, "fusion_norm": True, "component_norm": False, "noise_per": "image"}
    assert expected.items() <= report.config.items()


@pytest.mark.parametrize("name", ["gmgap-16-8-resnet18", "gmsop-16-8-resnet18"])
@torch.no_grad()
def test_a_mixture_with_other_batch_norms_is_imported(tmp_path: Path, name: str) -> None:
    """Neither the gate nor the mixed vector has a batch norm, but every convolution of a component."""
    released = f"{name}, other norms"
    file = save_v7(tmp_path / "net.mat", matconvnet(released))
    assert_logits(in_float64(file, name), logits_of(released), pixels())
    expected = {"fusion_norm": False, "gate_norm": False, "component_norm": True}
    assert expected.items() <= imported(file, name)[1].config.items()


def test_the_number_of_iterations_is_read_from_the_file(tmp_path: Path) -> None:
    released = "srsop-resnet18, 5 steps"
    ours, report = imported(save_v7(tmp_path / "net.mat", matconvnet(released)), "srsop-resnet18")
    assert report.config["iterations"] == 5
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(pixels()), logits_of(released), rtol=1e-4, atol=1e-4)


def test_the_network_input_is_raw_pixels_less_the_mean(tmp_path: Path) -> None:
    file = save_v7(tmp_path / "net.mat", matconvnet("resnet18-64px"))
    assert open_weights(file).average_color == pytest.approx(AVERAGE)
    _, report = imported(file, "resnet18-64px")
    image = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    seen = Normalize(report.preprocess)(image)
    wanted = image.permute(0, 3, 1, 2).double() - MEAN
    torch.testing.assert_close(seen.double(), wanted, rtol=1e-5, atol=1e-4)
    assert (report.preprocess.resize, report.preprocess.crop) == (16, 16)
    assert report.labels.startswith("numbers")


def weights(**arrays: np.ndarray[Any, Any]) -> WeightFile:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return WeightFile(path=Path("net.mat"), sha256="", tensors=tensors)


def test_a_deviation_below_sqrt_eps_keeps_its_effect() -> None:
    moments = np.array([[0.1, 1e-3], [0.2, 2.0]])
    file = weights(a_w=np.full((2, 1), 1.5), a_b=np.zeros((2, 1)), a_m=moments)
    parts = batch_norm(file, "a", "bn")
    assert parts["bn.running_var"][0] == 0
    factor = parts["bn.weight"] / (parts["bn.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(factor, torch.from_numpy(1.5 / moments[:, 1]))


def setting(layer: str, key: str, value: Any) -> Callable[[Net], None]:
    return lambda net: next(block for name, _, block in net.layers if name == layer).update({key: value})


def array(name: str, value: Any) -> Callable[[Net], None]:
    return lambda net: net.params.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("Cov_Sqrtm", "iterNum", "3"), "has no iterNum"),
        (lambda net: net.layers.append(("x", "dagnn.LRN", {})), "layer x has the type LRN"),
        (lambda net: net.params.pop("conv3_2b_bn_m"), "has no conv3_2b_bn_m"),
        (array("conv1_bn_m", np.ones(16)), "differs from the networks of GM-SOP"),
        (array("extra", np.ones((2, 2))), "no tensor for extra"),
        (array("conv1_b", np.full((16, 1), np.nan)), "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsupported_layer_or_array_is_named(
    tmp_path: Path, change: Callable[[Net], Any], message: str
) -> None:
    net = matconvnet("srsop-resnet18")
    change(net)
    with pytest.raises(WeightsError, match=message):
        imported(save_v7(tmp_path / "net.mat", net), "srsop-resnet18")


@pytest.mark.parametrize(
    ("released", "name", "message"),
    [
        ("srsop-resnet18", "resnet18-64px", "component is gap, not sop.*like SR-SOP.*--as srsop-resnet18"),
        ("gmsop-16-8-resnet18", "gmsop-16-8-resnet50", "blocks_per_stage is 6, not 2"),
        ("srsop-resnet18", "srsop-resnet18", r"--option iterations=5: .* holds 3"),
    ],
)
def test_another_network_or_a_contradicting_setting_is_refused(
    tmp_path: Path, released: str, name: str, message: str
) -> None:
    file = save_v7(tmp_path / "net.mat", matconvnet(released))
    contradiction = released == name
    with pytest.raises(ConfigError if contradiction else WeightsError, match=message):
        imported(file, name, settings={"iterations": 5} if contradiction else {})


DATA = Path(scipy.io.matlab.__file__).parent / "tests" / "data"
needs_samples = pytest.mark.skipif(not DATA.is_dir(), reason="scipy was installed without its sample files")


@needs_samples
@pytest.mark.parametrize("kind", ["double", "matrix", "minus", "onechar", "string", "unicode"])
@pytest.mark.parametrize("version", ["7.1", "7.4"])
def test_arrays_and_text_of_matlab_are_read(kind: str, version: str) -> None:
    sample = DATA / f"test{kind}_{version}_GLNX86.mat"
    expected = scipy.io.loadmat(sample)[f"test{kind}"]
    found = read_matlab(sample, {f"test{kind}"})[f"test{kind}"]
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
    found = read_matlab(tmp_path / "a.mat")
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
