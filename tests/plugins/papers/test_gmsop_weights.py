"""Imports of GM-SOP's MatConvNet files; released networks computed the logits."""

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import create_model
from sopdeploy.weights.conversion import choose_config, fit_tensors
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.import_weights import convert_weights, open_weights
from tests.sopdeploy.weights.released import (
    AVERAGE,
    RELEASED,
    Net,
    as_scipy,
    assert_logits,
    imported,
    matconvnet,
    pixels,
    save_v7,
    tree,
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
    file = open_weights(check_is_weights(path))
    found = convert_weights(file, name)
    config = choose_config(file, found, name, {})
    expected = fit_tensors(file, found, name, config).keys()
    network = (
        create_model(name, num_classes=found.num_classes, **config.model_dump()).double().eval()
    )
    exact = {name: tensor for name, tensor in found.tensors.items() if name in expected}
    missing = network.load_state_dict(exact, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return network


def logits_of(released: str) -> torch.Tensor:
    return torch.tensor(RELEASED[released]["logits"], dtype=torch.float64)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * ("wrn" in name)) for name in NETWORKS],
)
@torch.no_grad()
def test_logits_are_equal_in_float64_and_close_in_float32(tmp_path: Path, name: str) -> None:
    file = save_v7(tmp_path / "net.mat", matconvnet(name), "f4", compressed="sop" in name)
    assert_logits(in_float64(file, name), logits_of(name), pixels() / 60)
    _, report = imported(file, name)
    second_order = "sop" in name
    wrn = "wrn" in name
    expected: dict[str, Any] = {"conv5_stride": 1 if second_order else 2}
    if second_order:
        expected |= {"iterations": 3, "prenorm": "trace"}

    if "16-8" in name:
        expected |= {
            "chosen": 8,
            "components": 16,
            "balance_weight": 100.0,
            "dropout": 0.4 if wrn else 0.2,
        }
        expected |= {"gate_norm": True, "fusion_norm": True, "noise_per": "image"}

    assert expected.items() <= report.config.items()


def test_the_number_of_iterations_is_read_from_the_file(tmp_path: Path) -> None:
    released = "srsop-resnet18, 5 steps"
    ours, report = imported(
        save_v7(tmp_path / "net.mat", matconvnet(released)), "srsop-resnet18"
    )

    assert report.config["iterations"] == 5

    with torch.no_grad():
        torch.testing.assert_close(
            ours.double()(pixels() / 60), logits_of(released), rtol=1e-4, atol=1e-4
        )


def test_the_network_input_is_pixels_less_the_mean_divided_by_60(tmp_path: Path) -> None:
    file = save_v7(tmp_path / "net.mat", matconvnet("resnet18-64px"))
    _, report = imported(file, "resnet18-64px")
    image = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    seen = Normalize(report.preprocess, torch.contiguous_format)(image)
    wanted = (image.permute(0, 3, 1, 2).double() - MEAN) / 60

    torch.testing.assert_close(seen.double(), wanted, rtol=1e-5, atol=1e-4)
    assert (report.preprocess.resize, report.preprocess.crop) == (16, 16)
    assert report.labels.startswith("numbers")


def setting(layer: str, key: str, value: Any) -> Callable[[Net], None]:
    return lambda net: next(block for name, _, block in net.layers if name == layer).update(
        {key: value}
    )


def array(name: str, value: Any) -> Callable[[Net], None]:
    return lambda net: net.params.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("Cov_Sqrtm", "iterNum", "three"), "released networks"),
        (lambda net: net.layers.append(("x", "dagnn.LRN", {})), "type LRN"),
        (lambda net: net.params.pop("conv3_2b_bn_m"), "layer2.1.bn2.running_mean is missing"),
        (array("conv1_bn_m", np.ones(16)), "released networks"),
        (array("extra", np.ones((2, 2))), "no extra"),
        (array("CM_1_a_b", np.ones((8, 1))), "CM_1_a.bias"),
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
        ("srsop-resnet18", "resnet18-64px", "component .*--as srsop-resnet18"),
        (
            "gmsop-16-8-resnet18",
            "gmsop-16-8-resnet50",
            "blocks_per_stage .*--as gmsop-16-8-resnet18",
        ),
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


def test_a_network_of_another_size_than_the_catalogs_has_no_name(tmp_path: Path) -> None:
    net = matconvnet("gmsop-16-8-wrn36-2")
    # conv2_4a
    net.params = {name: value for name, value in net.params.items() if name[5:7] != "_4"}
    message = "3 blocks"

    with pytest.raises(WeightsError, match=message):
        imported(save_v7(tmp_path / "net.mat", net), "gmsop-16-8-resnet18")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"net": {"params": np.ones((40, 40))}})
    whole = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(WeightsError, match="damaged MATLAB file") as error:
        open_weights(check_is_weights(tmp_path / "a.mat"))
    assert "\n" not in str(error.value)


def deflated_matlab(file: Path) -> None:
    """A MATLAB file with an element of 256 MB of zeros."""
    compressor = zlib.compressobj()
    content = (
        b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()
    )
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    file.write_bytes(header + struct.pack("<II", 15, len(content)) + content)


@pytest.mark.slow
def test_what_expands_is_refused_before_it_does(tmp_path: Path) -> None:
    deflated_matlab(tmp_path / "weights.bin")
    tracemalloc.start()
    with pytest.raises(WeightsError, match="expands"):
        open_weights(check_is_weights(tmp_path / "weights.bin"))

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32_000_000


def test_version_73_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512))
    with pytest.raises(WeightsError, match="-v7"):
        open_weights(check_is_weights(tmp_path / "weights.bin"))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1, 1, 3), (2, 2, 3)])
def test_a_network_without_net_has_a_mean_color(tmp_path: Path, shape: tuple[int, ...]) -> None:
    net = tree(matconvnet("resnet18-64px"), "f8")["net"]
    color = np.ones(shape) * (np.array(AVERAGE).reshape(-1, 1) if shape == (3, 1) else AVERAGE)
    net["meta"]["normalization"] = {"averageImage": color}
    scipy.io.savemat(tmp_path / "net.mat", as_scipy(net))
    rules = imported(tmp_path / "net.mat", "resnet18-64px")[1].preprocess

    assert rules.mean == pytest.approx(np.array(AVERAGE) / 255)
    assert (rules.resize, rules.crop) == (64, 64)


def test_a_network_without_a_mean_color_is_refused(tmp_path: Path) -> None:
    net = tree(matconvnet("resnet18-64px"), "f8")
    net["net"]["meta"] = {}
    scipy.io.savemat(tmp_path / "net.mat", as_scipy(net))

    with pytest.raises(WeightsError, match=r"meta\.normalization\.averageImage"):
        imported(tmp_path / "net.mat", "resnet18-64px")
