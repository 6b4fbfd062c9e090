"""Which images are compared when a gate routes them, and what counts as another route."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sopdeploy.bundle.golden import write_golden
from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import Deployed, generated_images
from sopdeploy_export.parity.compare import compute_reference
from sopdeploy_export.parity.routing import (
    Routing,
    comparable,
    find_routes,
    is_decided,
    rerouted,
    routing_parity,
)
from sopdeploy_export.pipeline import as_probes
from tests.export.conftest import GMGAP, trained
from tests.export.once import ALONE
from tests.sweep.steps import measured, save

UNDERFLOW = [400.0, 100.0, 1.0, 0.0]  # the second of two weights is e^-300, which is 0 in float32
CLEAR = [3.0, 2.0, 1.0, 0.0]


def routes_of(logits: list[list[float]], own: list[list[float]] | None = None, noise: float = 0.0) -> Routing:
    exact = np.array(logits)
    return find_routes(exact, exact + noise if own is None else np.array(own), 2, 4.0)


@pytest.mark.parametrize(
    ("logits", "gates", "other"),
    [
        pytest.param(UNDERFLOW, [1.0, 0.0, 0.0, 0.0], False, id="a chosen weight of 0 in float32"),
        pytest.param(UNDERFLOW, [1.0, 1e-38, 0.0, 0.0], False, id="the same weight, almost 0"),
        pytest.param(UNDERFLOW, [1.0, 0.0, 1e-38, 0.0], True, id="a tiny weight of another component"),
        pytest.param(UNDERFLOW, [0.0, 1.0, 0.0, 0.0], True, id="the first component missing"),
        pytest.param(CLEAR, [0.7, 0.3, 0.0, 0.0], False, id="the two chosen components"),
        pytest.param(CLEAR, [1.0, 0.0, 0.0, 0.0], True, id="a visible weight missing"),
        pytest.param(CLEAR, [0.7, 0.0, 0.3, 0.0], True, id="another component"),
    ],
)
def test_a_route_is_the_set_of_largest_logits_not_of_positive_weights(
    logits: list[float], gates: list[float], other: bool
) -> None:
    assert rerouted(np.array([gates], dtype=np.float32), routes_of([logits])).tolist() == [other]


def test_a_changed_route_is_a_flip_where_the_gate_is_undecided_and_otherwise_wrong() -> None:
    routes = routes_of([CLEAR, [3.0, 1.0001, 1.0, 0.0]], noise=1e-3)
    assert routes.decided.tolist() == [True, False]
    both = routing_parity(np.array([True, True]), routes)
    assert (both.num_flips, both.num_wrong, both.num_undecided) == (1, 1, 1)


@pytest.mark.parametrize(
    ("logits", "chosen", "decided"),
    [(CLEAR, 2, True), ([3.0, 0.0, 1.0001, 1.0], 2, False)],
)
def test_only_an_image_with_a_decided_gate_becomes_a_golden_example(
    logits: list[float], chosen: int, decided: bool, tmp_path: Path
) -> None:
    routing = routing_parity(np.array([False]), routes_of([CLEAR], noise=1e-3))
    write_golden(
        tmp_path,
        Preprocess(resize=8, crop=8),
        lambda _: np.zeros(2, np.float32),
        1.0,
        lambda _: is_decided(np.array(logits), chosen, routing),
    )
    assert (tmp_path / "golden-0.jpg").exists() == decided


def test_undecided_images_are_left_out_if_others_are_decided() -> None:
    routes = routes_of([CLEAR, [3.0, 1.0001, 1.0, 0.0]], [CLEAR, [3.0, 1.0, 1.001, 0.0]])
    none = np.zeros(2, dtype=bool)
    assert comparable(none, routes).tolist() == [True, False]
    assert routing_parity(none, routes).left_out == (1,)


def test_images_rerouted_by_rounding_are_left_out_if_none_is_decided() -> None:
    close, flipped = [3.0, 1.001, 1.0, 0.0], [3.0, 1.0, 1.01, 0.0]
    routes = routes_of([close] * 3, [close, close, flipped])
    assert not routes.decided.any()
    other = np.array([False, True, False])
    assert comparable(other, routes).tolist() == [True, False, False]
    found = routing_parity(other, routes)
    assert (found.num_undecided, found.num_flips, found.num_wrong, found.left_out) == (3, 1, 0, (1, 2))


def test_a_correct_file_with_underflowing_gate_weights_passes(tmp_path: Path) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    torch.nn.init.normal_(network.gate.weight, std=300)
    checkpoint = save(network, "gmgap-16-8-resnet18", 16, tmp_path / "ckpt.pt")
    expected, parity = measured(checkpoint, tmp_path / "model.onnx", batch=ALONE)
    assert parity.routing is not None
    assert parity.routing.num_wrong == 0
    probes = as_probes(generated_images(16), expected, parity)
    assert (probes.expected["gates"] == 0).sum(axis=1).max() == 3  # one of the two chosen weights is 0
    assert len(probes.images) == parity.num_images - len(parity.routing.left_out)


def test_a_gate_that_rounding_changes_on_every_image_is_refused(
    preprocess: Preprocess, probes: torch.Tensor
) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    deployed = Deployed(network, preprocess).eval()
    noisy = np.tile([0.0, 1.0, 2.0, 3.0], (3, 1))  # the gate of this network ties and takes the first two
    with pytest.raises(ParityError, match=r"undecided on every probe image.*int8.*; train longer"):
        compute_reference(deployed, probes[:3].numpy(), deployed, "int8", lambda _: noisy)
