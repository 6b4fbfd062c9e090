"""Imports of GM-SOP's MatConvNet files, in both MATLAB formats, against reference networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.importers.fit import choose_config, fit_tensors
from sopdeploy.importers.gmsop import GMSOPNetwork
from sopdeploy.importers.matconvnet import batch_norm, conv_kernel
from sopdeploy.importers.source import MappedTensor, WeightFile
from sopdeploy.importers.weight_files import open_weights
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import create_model
from tests.sopdeploy.importers.comparing import NOISE, imported
from tests.sopdeploy.importers.released_matconvnet import (
    AVERAGE,
    Net,
    forward,
    on_normalized,
    random_net,
    save_v7,
    save_v73,
)

SAVERS = {"v7": save_v7, "v7.3": save_v73}
WRN = {"blocks": 4, "widen": 2, "wrn": True}
RELEASED: dict[str, dict[str, Any]] = {
    "resnet18-64px": {"order": 1, "gated": False},
    "srsop-resnet18": {"order": 2, "gated": False},
    "gmgap-16-8-resnet18": {"order": 1, "gated": True},
    "gmsop-16-8-resnet18": {"order": 2, "gated": True},
    "gmgap-16-8-wrn36-2": {"order": 1, "gated": True, **WRN},
    "gmsop-16-8-wrn36-2": {"order": 2, "gated": True, **WRN},
}


def images(count: int = 6) -> torch.Tensor:
    """Images of 0..255 less the mean."""
    torch.manual_seed(1)
    raw = torch.randint(0, 256, (count, 3, 16, 16)).double()
    return raw - torch.tensor(AVERAGE, dtype=torch.float64)[:, None, None]


def in_single(net: Net) -> Net:
    """Round the arrays as the released files have them."""
    net.params = {name: value.astype("f4").astype("f8") for name, value in net.params.items()}
    return net


def in_float64(path: Path, name: str) -> torch.nn.Module:
    """Build the network with the numbers of the file before they are rounded to float32."""
    file = open_weights(path)
    found = GMSOPNetwork().convert(file, name)
    config = choose_config(file, found, name, {})
    _, rows = fit_tensors(file, found, name, config)
    network = create_model(name, num_classes=found.num_classes, **config.model_dump()).double().eval()
    network.load_state_dict({row.name: row.tensor for row in rows})
    return network


@pytest.mark.parametrize(
    ("name", "container"),
    [*((name, "v7.3") for name in RELEASED), ("resnet18-64px", "v7"), ("gmsop-16-8-resnet18", "v7")],
)
@torch.no_grad()
def test_logits_are_equal_in_float64_and_within_float32_noise(
    tmp_path: Path, name: str, container: str
) -> None:
    net = in_single(random_net(**RELEASED[name]))
    file = SAVERS[container](tmp_path / "net.mat", net, dtype="f4")
    original = on_normalized(net)
    exact = original(images())
    assert (exact[0] - exact[1]).abs().max() > 1e-3
    torch.testing.assert_close(in_float64(file, name)(images()), exact, rtol=1e-7, atol=1e-7)
    ours, report = imported(file, name)
    assert_switches_of_the_layers(name, report.config)
    assert {theirs for row in report.rows for theirs in row.of} == net.params.keys()
    noise = (original(images().float()).double() - exact).abs().max()
    assert (ours(images().float()).double() - exact).abs().max() <= NOISE * noise


def assert_switches_of_the_layers(name: str, config: dict[str, Any]) -> None:
    assert config["input_scaling"] == "raw"
    assert config["conv5_stride"] == (2 if RELEASED[name]["order"] == 1 else 1)
    assert config["project_first_stage"] == RELEASED[name].get("wrn", False)
    if RELEASED[name]["order"] == 2:
        assert (config["iterations"], config["prenorm"]) == (3, "trace")
    if RELEASED[name]["gated"]:
        assert (config["chosen"], config["components"], config["balance_weight"]) == (8, 16, 100.0)
        assert config["dropout"] == (0.4 if name == "gmsop-16-8-wrn36-2" else 0.2)


def test_the_number_of_iterations_is_read_from_the_file(tmp_path: Path) -> None:
    net = random_net(order=2, gated=False)
    net.steps = 5
    for _, kind, block in net.layers:
        if kind.endswith("Cov_Sqrtm"):
            block["iterNum"] = 5.0
    ours, report = imported(save_v7(tmp_path / "net.mat", net), "srsop-resnet18")
    assert report.config["iterations"] == 5
    with torch.no_grad():
        torch.testing.assert_close(
            ours.double()(images()), on_normalized(net)(images()), rtol=1e-4, atol=1e-4
        )


def test_the_network_input_is_raw_pixels_less_the_mean(tmp_path: Path) -> None:
    net = random_net(order=1, gated=False)
    _, report = imported(save_v73(tmp_path / "net.mat", net), "resnet18-64px")
    image = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    seen = Normalize(report.preprocess)(image)
    wanted = image.permute(0, 3, 1, 2).double() - torch.tensor(AVERAGE, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(seen.double(), wanted, rtol=1e-5, atol=1e-4)
    assert (report.preprocess.resize, report.preprocess.crop) == (16, 16)
    assert report.labels.startswith("numbers")


def test_the_average_color_is_read_from_the_file(tmp_path: Path) -> None:
    net = random_net(order=1, gated=False)
    file = save_v7(tmp_path / "net.mat", net)
    average = open_weights(file).average_color
    assert average == pytest.approx(AVERAGE)


def weights(**arrays: np.ndarray[Any, Any]) -> WeightFile:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return WeightFile(path=Path("net.mat"), tensors=tensors)


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (3, 3, 4), (3, 3), (1, 1, 4)])
def test_kernels_regain_the_axes_that_matlab_dropped(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    full = array.reshape(*shape, *(1,) * (4 - len(shape)))
    assert torch.equal(conv_kernel(weights(a_f=array), "a_f"), torch.from_numpy(full).permute(3, 2, 0, 1))


def test_a_deviation_below_sqrt_eps_keeps_its_effect() -> None:
    moments = np.array([[0.1, 1e-3], [0.2, 2.0]])
    file = weights(a_w=np.full((2, 1), 1.5), a_b=np.zeros((2, 1)), a_m=moments)
    parts = {row.name: row.tensor for row in batch_norm(file, "a", "a")}
    assert parts["a.running_var"][0] == 0
    factor = parts["a.weight"] / (parts["a.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(factor, torch.from_numpy(1.5 / moments[:, 1]))


def changed_block(net: Net, layer: str, key: str, value: Any) -> None:
    for name, _, block in net.layers:
        if name == layer:
            block[key] = value


BROKEN: dict[str, tuple[Any, str]] = {
    "no steps": (lambda n: changed_block(n, "Cov_Sqrtm", "iterNum", "3"), "has no iterNum"),
    "half a step": (lambda n: changed_block(n, "Cov_Sqrtm", "iterNum", 2.5), "need an integer"),
    "a scaled root": (lambda n: changed_block(n, "Cov_Sqrtm", "coef", 2.0), "scales its root"),
    "two strides": (
        lambda n: changed_block(n, "conv5_1a_conv", "stride", np.array([[1.0, 2.0]])),
        "one number",
    ),
    "another stride": (
        lambda n: changed_block(n, "conv3_1a_conv", "stride", 1.0),
        "the paper's stride 2",
    ),
    "unknown layer": (lambda n: n.layers.append(("x", "dagnn.LRN", {})), "layer x has the type LRN"),
    "no layer": (
        lambda n: n.layers.pop(next(i for i, x in enumerate(n.layers) if x[0] == "conv5_1a_conv")),
        "no layer",
    ),
    "missing array": (lambda n: n.params.pop("conv3_2b_bn_m"), "has no conv3_2b_bn_m"),
    "left over": (lambda n: n.params.update(extra=np.ones((2, 2))), "no place for extra"),
    "moments of one column": (
        lambda n: n.params.update(conv1_bn_m=np.ones((16, 1))),
        "not \\(channels, 2\\)",
    ),
    "untrained": (lambda n: n.params.update(conv1_bn_m=np.zeros((16, 2))), "deviation that is not positive"),
    "another shape": (
        lambda n: n.params.update(conv1_b=np.ones((7, 1))),
        "conv1.bias has shape \\(7,\\), not \\(16,\\)",
    ),
    "not finite": (lambda n: n.params.update(conv1_b=np.full((16, 1), np.nan)), "not finite"),
    "a wide classifier": (
        lambda n: n.params.update(prediction_f=np.ones((3, 3, 4, 5))),
        "not a 1x1 convolution",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_network_other_than_the_released_one_is_refused(tmp_path: Path, what: str) -> None:
    net = random_net(order=2, gated=False)
    change, said = BROKEN[what]
    change(net)
    with pytest.raises(WeightsError, match=said):
        imported(save_v7(tmp_path / "net.mat", net), "srsop-resnet18")


@pytest.mark.parametrize(
    ("released", "name", "said"),
    [
        (
            "srsop-resnet18",
            "resnet18-64px",
            "component is gap, not sop.*looks like SR-SOP.*--as srsop-resnet18",
        ),
        ("gmsop-16-8-resnet18", "gmsop-16-8-resnet50", "blocks_per_stage is 6, not 2"),
        ("gmsop-16-8-wrn36-2", "gmsop-16-8-resnet18", "--as gmsop-16-8-wrn36-2"),
        ("resnet18-64px", "resnet20", "looks like GAP, 2 blocks per stage"),
        ("gmsop-16-8-resnet18", "avesop-16-resnet18", "--as gmsop-16-8-resnet18"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, released: str, name: str, said: str) -> None:
    file = save_v7(tmp_path / "net.mat", random_net(**RELEASED[released]))
    with pytest.raises(WeightsError, match=said):
        imported(file, name)


def test_iterations_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    file = save_v7(tmp_path / "net.mat", random_net(order=2, gated=False))
    with pytest.raises(ConfigError, match=r"--set iterations=5: .* holds 3"):
        imported(file, "srsop-resnet18", settings={"iterations": 5})


def test_every_triangle_is_made_row_wise_once(tmp_path: Path) -> None:
    file = save_v7(tmp_path / "net.mat", random_net(order=2, gated=True))
    found = GMSOPNetwork().convert(open_weights(file), "gmsop-16-8-resnet18")
    turned = {row.name for row in found.tensors if "row-wise" in row.how}
    norm = {f"head.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert turned == {"gate.weight", "gate.noise.weight", "head.fc.weight", *norm}
    assert all(isinstance(row, MappedTensor) for row in found.tensors)


def test_the_reference_depends_on_the_order_of_the_triangle() -> None:
    """The reference itself: with the vectors in rows' order the logits would be others."""
    net = random_net(order=2, gated=False)
    images = np.random.default_rng(0).uniform(0, 255, (16, 16, 3, 2))
    first = forward(net, images)
    net.params["prediction_f"] = net.params["prediction_f"][:, :, ::-1]
    assert np.abs(forward(net, images) - first).max() > 1e-3
