"""Which images a gate's comparison counts, and what it takes for another route."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph.onnx_export import operator_counts, write
from sopdeploy_export.graph.probe_images import probe_images
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity.compare import compare, spread
from sopdeploy_export.parity.reference import Reference, compute_reference
from sopdeploy_export.parity.routing import Routing, counted, rerouted, routing, routing_parity
from sopdeploy_export.report.results import as_probes
from tests.export.conftest import trained
from tests.export.once import graph_of
from tests.sweep.steps import measured, save

FAR = [400.0, 100.0, 1.0, 0.0]  # the second of two has e^-300 of the weight, which float32 cannot say
NEAR = [3.0, 2.0, 1.0, 0.0]
GMGAP = {
    "components": 4,
    "chosen": 2,
    "component_widths": (6,),
    "gate_widths": (),
    "blocks_per_stage": 1,
    "conv5_stride": 1,
}


def routes_of(logits: list[list[float]], own: list[list[float]] | None = None) -> Routing:
    exact = np.array(logits)
    network = trained("gmsop-16-8-resnet18", components=4, chosen=2)
    return routing(exact, exact if own is None else np.array(own), network, 4.0)


@pytest.mark.parametrize(
    ("logits", "gates", "other"),
    [
        (FAR, [1.0, 0.0, 0.0, 0.0], False),
        (FAR, [1.0, 1e-38, 0.0, 0.0], False),
        (FAR, [1.0, 0.0, 1e-38, 0.0], True),
        (FAR, [0.0, 1.0, 0.0, 0.0], True),
        (NEAR, [0.7, 0.3, 0.0, 0.0], False),
        (NEAR, [1.0, 0.0, 0.0, 0.0], True),
        (NEAR, [0.7, 0.0, 0.3, 0.0], True),
    ],
    ids=[
        "a kept weight of 0 in float32",
        "the same weight, almost 0",
        "another component, however little",
        "the first one missing",
        "the two that were chosen",
        "a weight missing that would be seen",
        "another component",
    ],
)
def test_a_route_is_which_logits_are_largest_not_which_weights_are_positive(
    logits: list[float], gates: list[float], other: bool
) -> None:
    assert rerouted(np.array([gates], dtype=np.float32), routes_of([logits])).tolist() == [other]


def test_undecided_images_are_left_out_where_the_gate_is_decided_on_others() -> None:
    routes = routes_of([NEAR, [3.0, 1.0001, 1.0, 0.0]], [NEAR, [3.0, 1.0, 1.001, 0.0]])
    none = np.zeros(2, dtype=bool)
    assert counted(none, routes).tolist() == [True, False]
    assert routing_parity(none, routes).left_out == (1,)


def test_where_all_are_undecided_those_that_rounding_sent_elsewhere_are_left_out() -> None:
    close, flipped = [3.0, 1.001, 1.0, 0.0], [3.0, 1.0, 1.01, 0.0]
    routes = routes_of([close] * 3, [close, close, flipped])
    assert not routes.decided
    other = np.array([False, True, False])
    assert counted(other, routes).tolist() == [True, False, False]
    found = routing_parity(other, routes)
    assert (found.unsteady, found.flips, found.wrong, found.left_out) == (3, 1, 0, (1, 2))


def test_a_sound_file_whose_gate_is_loud_agrees(tmp_path: Path) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    torch.nn.init.normal_(network.gate.weight, std=300)
    checkpoint = save(network, "gmgap-16-8-resnet18", 16, tmp_path / "ckpt.pt")
    expected, parity = measured(checkpoint, tmp_path / "model.onnx")
    assert parity.routing is not None
    assert parity.routing.wrong == 0
    probes = as_probes(probe_images(Preprocess(resize=16, crop=16)), expected, parity)
    assert (probes.expected["gates"] == 0).sum(axis=1).max() == 3  # a kept weight is 0
    assert len(probes.images) == parity.images - len(parity.routing.left_out)


def test_a_gate_that_rounding_turns_on_every_image_is_refused_with_what_to_do(
    preprocess: Preprocess, probes: torch.Tensor
) -> None:
    network = trained("gmgap-16-8-resnet18", **GMGAP)
    deployed = Deployed(network, preprocess).eval()
    images = probes[:3].numpy()
    noisy = np.tile([0.0, 1.0, 2.0, 3.0], (3, 1))  # the network's own gate ties and takes the first two
    with pytest.raises(ParityError, match=r"undecided on every probe image.*int8.*add --probes DIR"):
        compute_reference(deployed, images, deployed, "int8", lambda _: noisy)


def test_a_spread_is_over_images_and_over_classes_where_there_is_one() -> None:
    assert spread(np.array([[1.0, 5.0], [4.0, 5.5]])) == 3.0
    assert spread(np.array([[1.0, 5.0]])) == 4.0


@pytest.mark.parametrize(("share", "stops"), [(0.124, False), (0.126, True)])
def test_noise_as_wide_as_the_logits_stops_a_reduced_precision(
    preprocess: Preprocess, probes: torch.Tensor, tmp_path: Path, share: float, stops: bool
) -> None:
    """Four floors are allowed, a blind file is off by half of the spread: from an eighth on it would pass."""
    batch = BatchRange(optimum=2, maximum=4)
    network, _, model = graph_of("resnet8", preprocess, batch)
    write(model, tmp_path / "model.onnx")
    images = probes.numpy()
    exact = compute_reference(Deployed(network, preprocess).eval(), images)
    floor = share * spread(exact.outputs["logits"])
    noisy = Reference(outputs=exact.outputs, noise_floor={"logits": floor}, precision="fp16")
    arguments = (tmp_path / "model.onnx", noisy, images, batch, operator_counts(model))
    if not stops:
        assert compare(*arguments).passed
        return
    with pytest.raises(
        ParityError, match=r"noise floor of .* is 13% of the spread.*from 12\.5% on"
    ) as caught:
        compare(*arguments)
    assert "\n" not in str(caught.value)
    allowed = compare(*arguments, allow_drift=True)
    assert (allowed.passed, allowed.drift_allowed, allowed.vacuous) == (False, True, True)


def test_in_int8_answers_on_pictures_are_what_is_judged_and_not_the_noise_of_a_probe(
    preprocess: Preprocess, probes: torch.Tensor, tmp_path: Path
) -> None:
    batch = BatchRange(optimum=2, maximum=4)
    network, _, model = graph_of("resnet8", preprocess, batch)
    write(model, tmp_path / "model.onnx")
    images = probes.numpy()
    exact = compute_reference(Deployed(network, preprocess).eval(), images)
    floor = 0.3 * spread(exact.outputs["logits"])
    noisy = Reference(outputs=exact.outputs, noise_floor={"logits": floor}, precision="int8")
    report = compare(tmp_path / "model.onnx", noisy, images, batch, operator_counts(model))
    assert (report.passed, report.vacuous) == (True, False)
