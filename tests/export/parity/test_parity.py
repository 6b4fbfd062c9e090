from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import Tensor

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph.onnx_export import operator_counts, write
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity.compare import compare
from sopdeploy_export.parity.reference import Reference, compute_reference
from sopdeploy_export.parity.report import FLOORS, ParityReport, agreement
from tests.export.once import graph_of

Make = Callable[..., Classifier]
BATCH = BatchRange(optimum=4, maximum=9)


@pytest.fixture(scope="module")
def shipped(
    preprocess: Preprocess,
) -> tuple[onnx.ModelProto, Deployed]:
    network, _, model = graph_of("resnet8", preprocess, BATCH)
    return model, Deployed(network, preprocess).eval()


def changed(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            values = change(onnx.numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return copy


def measure(
    model: onnx.ModelProto, deployed: Deployed, probes: Tensor, path: Path, *, allow_drift: bool = False
) -> ParityReport:
    write(model, path)
    images = probes.numpy()
    expected = compute_reference(deployed, images)
    return compare(path, expected, images, BATCH, operator_counts(model), allow_drift=allow_drift)


def test_the_file_that_ships_stays_within_the_noise(
    shipped: tuple[onnx.ModelProto, Deployed], probes: Tensor, tmp_path: Path
) -> None:
    report = measure(*shipped, probes, tmp_path / "model.onnx")
    assert report.passed
    assert report.outputs.keys() == {"logits"}
    assert report.logits.drift.keys() == {"1", "2", "4", "8"}
    assert report.logits.tolerance == pytest.approx(FLOORS * report.logits.noise_floor)
    assert report.logits.drift_in_floors < FLOORS
    assert report.top1.agree + report.top1.flips_within_noise == report.images == 12


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fc.bias", lambda values: values + 1e-3),
        ("conv1.weight", lambda values: values * 1.001),
        ("normalise.offset", lambda values: values[:, ::-1]),
        ("layer2.0.conv2.weight", lambda values: values.swapaxes(2, 3)),
    ],
)
def test_a_file_that_drifts_stops_the_export(
    shipped: tuple[onnx.ModelProto, Deployed],
    probes: Tensor,
    tmp_path: Path,
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    model, deployed = shipped
    with pytest.raises(ParityError, match=r"drifts by .* in logits, .* noise floors; .*--allow-drift"):
        measure(changed(model, name, change), deployed, probes, tmp_path / "model.onnx")


def test_an_allowed_drift_is_recorded(
    shipped: tuple[onnx.ModelProto, Deployed], probes: Tensor, tmp_path: Path
) -> None:
    model, deployed = shipped
    drifting = changed(model, "fc.bias", lambda values: values + 1e-3)
    report = measure(drifting, deployed, probes, tmp_path / "model.onnx", allow_drift=True)
    assert not report.passed
    assert report.drift_allowed
    assert report.logits.largest_drift == pytest.approx(1e-3, rel=0.05)


def test_numbers_that_are_not_finite_are_never_allowed(
    shipped: tuple[onnx.ModelProto, Deployed], probes: Tensor, tmp_path: Path
) -> None:
    model, deployed = shipped
    broken = changed(model, "fc.bias", lambda values: values * np.nan)
    with pytest.raises(ParityError, match="not finite"):
        measure(broken, deployed, probes, tmp_path / "model.onnx", allow_drift=True)


def test_a_network_whose_own_answer_is_not_finite_is_refused(
    make: Make, preprocess: Preprocess, probes: Tensor
) -> None:
    network = make("resnet8")
    network.get_parameter("fc.bias").data.fill_(float("inf"))
    with pytest.raises(ParityError, match="network's own logits are not finite"):
        compute_reference(Deployed(network, preprocess).eval(), probes.numpy())


def test_the_noise_floor_is_the_distance_of_the_networks_own_float32_run(
    shipped: tuple[onnx.ModelProto, Deployed], probes: Tensor
) -> None:
    found: Reference = compute_reference(shipped[1], probes.numpy())
    logits, floor = found.outputs["logits"], found.noise_floor["logits"]
    scale = float(np.abs(logits).max())
    assert logits.dtype == np.float64
    assert 1e-7 * scale < floor < 1e-4 * scale


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, 2.0], (1, 0, 0)),
        ([1.05, 1.0], (0, 1, 0)),
        ([2.0, 0.0], (0, 0, 1)),
    ],
    ids=["the same class", "a flip the network was unsure of", "a flip it was sure of"],
)
def test_flips_are_counted_by_the_networks_margin(row: list[float], expected: tuple[int, int, int]) -> None:
    margin = [1.0, 1.1] if expected[1] else [0.0, 2.0]
    found = agreement(np.array([row]), np.array([margin]), tolerance=0.06)
    assert (found.agree, found.flips_within_noise, found.flips) == expected


def test_every_flip_is_listed_with_its_margin_and_its_reason() -> None:
    expected = np.array([[1.0, 0.0, 0.9], [1.0, 0.0, 0.9], [1.0, 0.0, 0.9], [1.0, 0.0, 0.9]])
    values = np.array([[1.0, 0.0, 0.9], [1.0, 0.0, 1.1], [0.0, 1.0, 0.9], [0.0, 1.0, 0.9]])
    rerouted = np.array([False, False, False, True])
    found = agreement(values, expected, 0.06, rerouted)
    assert [(flip.image, flip.network, flip.file, flip.because) for flip in found.flipped] == [
        (1, 0, 2, "noise"),
        (2, 0, 1, "error"),
        (3, 0, 1, "routing"),
    ]
    assert [flip.margin for flip in found.flipped] == pytest.approx([0.1, 1.0, 1.0])
    assert (found.flips_within_noise, found.flips, found.flips_by_routing) == (1, 1, 1)
