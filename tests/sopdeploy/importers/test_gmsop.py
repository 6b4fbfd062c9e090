"""Imports of GM-SOP's MatConvNet files, in both MATLAB formats, against reference networks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.importers.conversion import WeightFile, choose_config, fit_tensors
from sopdeploy.importers.gmsop import convert_gmsop
from sopdeploy.importers.matconvnet import batch_norm
from sopdeploy.importers.weight_files import open_weights
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import create_model
from tests.sopdeploy.importers.released_matconvnet import (
    AVERAGE,
    Net,
    random_net,
    reference_logits,
    save_v7,
    save_v73,
)
from tests.sopdeploy.importers.released_torch import NOISE, imported

SAVERS = {"v7": partial(save_v7, compressed=True), "v7.3": save_v73}
WRN = {"blocks": 4, "widen": 2, "wrn": True}
RELEASED: dict[str, dict[str, Any]] = {
    "resnet18-64px": {"order": 1, "gated": False},
    "srsop-resnet18": {"order": 2, "gated": False},
    "gmgap-16-8-resnet18": {"order": 1, "gated": True},
    "gmsop-16-8-resnet18": {"order": 2, "gated": True},
    "gmgap-16-8-wrn36-2": {"order": 1, "gated": True, **WRN},
    "gmsop-16-8-wrn36-2": {"order": 2, "gated": True, **WRN},
}
MEAN = torch.tensor(AVERAGE, dtype=torch.float64)[:, None, None]


def images() -> torch.Tensor:
    """Images of 0..255 less the mean."""
    torch.manual_seed(1)
    return torch.randint(0, 256, (6, 3, 16, 16)).double() - MEAN


def in_float64(path: Path, name: str) -> torch.nn.Module:
    """Build the network with the numbers of the file before they are rounded to float32."""
    file = open_weights(path)
    found = convert_gmsop(file, name)
    config = choose_config(file, found, name, {})
    expected = fit_tensors(file, found, name, config).keys()
    network = create_model(name, num_classes=found.num_classes, **config.model_dump()).double().eval()
    exact = {mapped.name: mapped.tensor for mapped in found.tensors if mapped.name in expected}
    missing = network.load_state_dict(exact, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return network


@pytest.mark.parametrize(
    ("name", "container"),
    [
        *((name, "v7.3") for name in RELEASED if "wrn" not in name),
        ("gmsop-16-8-resnet18", "v7"),
        *(pytest.param(name, "v7.3", marks=pytest.mark.slow) for name in RELEASED if "wrn" in name),
    ],
)
@torch.no_grad()
def test_logits_are_equal_in_float64_and_within_float32_noise(
    tmp_path: Path, name: str, container: str
) -> None:
    released = RELEASED[name]
    net = random_net(**released)
    net.params = {key: value.astype("f4").astype("f8") for key, value in net.params.items()}
    file = SAVERS[container](tmp_path / "net.mat", net, dtype="f4")
    exact = reference_logits(net, images())
    assert (exact[0] - exact[1]).abs().max() > 1e-3
    torch.testing.assert_close(in_float64(file, name)(images()), exact, rtol=1e-7, atol=1e-7)
    ours, report = imported(file, name)
    expected = {
        "input_scaling": "raw",
        "conv5_stride": 2 if released["order"] == 1 else 1,
        "project_first_stage": released.get("wrn", False),
    }
    if released["order"] == 2:
        expected |= {"iterations": 3, "prenorm": "trace"}
    if released["gated"]:
        dropout = 0.4 if name == "gmsop-16-8-wrn36-2" else 0.2
        expected |= {"chosen": 8, "components": 16, "balance_weight": 100.0, "dropout": dropout}
        expected |= {"gate_norm": True, "fusion_norm": True, "component_norm": False, "noise_per": "image"}
    assert expected.items() <= report.config.items()
    noise = (reference_logits(net, images().float()).double() - exact).abs().max()
    assert (ours(images().float()).double() - exact).abs().max() <= NOISE * noise


@pytest.mark.parametrize("name", ["gmgap-16-8-resnet18", "gmsop-16-8-resnet18"])
def test_a_mixture_with_other_batch_norms_is_imported(tmp_path: Path, name: str) -> None:
    """Neither the gate nor the mixed vector has a batch norm, but every convolution of a component."""
    net = random_net(**RELEASED[name])
    norms = ("fusion_bn", "gating1_bn", "gating2_bn")
    net.params = {key: value for key, value in net.params.items() if not key.startswith(norms)}
    net.layers = [layer for layer in net.layers if not layer[0].startswith(norms)]
    for kernel in [key for key in net.params if key.startswith("CM_")]:
        net.norm(kernel.removesuffix("_f"), net.params[kernel].shape[3])
    file = save_v7(tmp_path / "net.mat", net)
    with torch.no_grad():
        exact = reference_logits(net, images())
        torch.testing.assert_close(in_float64(file, name)(images()), exact, rtol=1e-7, atol=1e-7)
    expected = {"fusion_norm": False, "gate_norm": False, "component_norm": True}
    assert expected.items() <= imported(file, name)[1].config.items()


def test_the_number_of_iterations_is_read_from_the_file(tmp_path: Path) -> None:
    net = random_net(order=2, gated=False)
    net.steps = 5
    next(block for _, kind, block in net.layers if kind.endswith("Cov_Sqrtm"))["iterNum"] = 5.0
    ours, report = imported(save_v7(tmp_path / "net.mat", net), "srsop-resnet18")
    assert report.config["iterations"] == 5
    with torch.no_grad():
        expected = reference_logits(net, images())
        torch.testing.assert_close(ours.double()(images()), expected, rtol=1e-4, atol=1e-4)


def test_the_network_input_is_raw_pixels_less_the_mean(tmp_path: Path) -> None:
    file = save_v73(tmp_path / "net.mat", random_net(order=1, gated=False))
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
    return WeightFile(path=Path("net.mat"), tensors=tensors)


def test_a_deviation_below_sqrt_eps_keeps_its_effect() -> None:
    moments = np.array([[0.1, 1e-3], [0.2, 2.0]])
    file = weights(a_w=np.full((2, 1), 1.5), a_b=np.zeros((2, 1)), a_m=moments)
    parts = {row.name: row.tensor for row in batch_norm(file, "a", "a")}
    assert parts["a.running_var"][0] == 0
    factor = parts["a.weight"] / (parts["a.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(factor, torch.from_numpy(1.5 / moments[:, 1]))


def setting(layer: str, key: str, value: Any) -> Callable[[Net], None]:
    return lambda net: next(block for name, _, block in net.layers if name == layer).update({key: value})


def array(name: str, value: Any) -> Callable[[Net], None]:
    return lambda net: net.params.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("Cov_Sqrtm", "iterNum", "3"), "has no iterNum"),
        (lambda net: net.layer("x", "LRN"), "layer x has the type LRN"),
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
    net = random_net(order=2, gated=False)
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
    file = save_v7(tmp_path / "net.mat", random_net(**RELEASED[released]))
    contradiction = released == name
    with pytest.raises(ConfigError if contradiction else WeightsError, match=message):
        imported(file, name, settings={"iterations": 5} if contradiction else {})
