"""Sabotage in the file that ships: each is caught, and the part is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from torch import Tensor
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph.onnx_export import check, operator_counts, write
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity.bisect import (
    PARTS,
    Boundary,
    farthest,
    find_first_drift,
    part_drifts,
    run_file,
    spread_over_depth,
)
from sopdeploy_export.parity.compare import compare
from sopdeploy_export.parity.reference import compute_reference
from sopdeploy_export.parity.report import FLOORS
from sopdeploy_export.parity.routing import routing, routing_parity
from tests.export.once import graph_of

BATCH = BatchRange(optimum=4, maximum=9)
Shipped = tuple[Classifier, ExportedProgram, onnx.ModelProto]


@pytest.fixture(scope="module")
def shipped(preprocess: Preprocess) -> Shipped:
    return graph_of("isqrt-resnet8", preprocess, BATCH)


def rounded(model: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """Round *value* to ten bits of mantissa, as a TF32 product has them, by a detour through float16."""
    noisy = onnx.ModelProto()
    noisy.CopyFrom(model)
    nodes = []
    for node in noisy.graph.node:
        nodes.append(node)
        if node.output[0] == value:
            node.output[0] = f"{value}:exact"
            nodes.append(helper.make_node("Cast", [f"{value}:exact"], [f"{value}:ten"], to=10))
            nodes.append(helper.make_node("Cast", [f"{value}:ten"], [value], to=1))
    del noisy.graph.node[:]
    noisy.graph.node.extend(nodes)
    return noisy


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("matmul_4", "pooling.root: iteration 3"),
        ("baddbmm_2", "pooling.root: iteration 4"),
        ("matmul", "pooling.root: covariance"),
        ("relu_3", "layer2.0"),
    ],
)
def test_noise_as_of_tf32_is_caught_and_its_place_is_named(
    shipped: Shipped, preprocess: Preprocess, probes: Tensor, tmp_path: Path, value: str, part: str
) -> None:
    network, program, model = shipped
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(rounded(model, value), path)
    expected = compute_reference(Deployed(network, preprocess).eval(), images)

    def locate(file: Path) -> str | None:
        return find_first_drift(file, program, network.outputs, images, FLOORS)

    with pytest.raises(ParityError, match=rf"first part over its floor is {part}"):
        compare(path, expected, images, BATCH, operator_counts(model), locate=locate)


def test_a_sound_file_has_no_part_over_its_floor(shipped: Shipped, probes: Tensor, tmp_path: Path) -> None:
    network, program, model = shipped
    write(model, tmp_path / "model.onnx")
    assert find_first_drift(tmp_path / "model.onnx", program, network.outputs, probes.numpy(), FLOORS) is None


def test_a_batch_axis_fixed_to_one_is_caught(
    shipped: Shipped, preprocess: Preprocess, probes: Tensor, tmp_path: Path
) -> None:
    network, _, model = shipped
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(fixed, path)
    expected = compute_reference(Deployed(network, preprocess).eval(), images)
    with pytest.raises(ParityError, match="takes no batch of 2"):
        compare(path, expected, images, BATCH, operator_counts(fixed))


def gate(logits: Callable[[], list[list[float]]], noise: float) -> object:
    from tests.export.conftest import trained

    exact = np.array(logits())
    network = trained("gmsop-16-8-resnet18", components=4, chosen=2)
    return routing(exact, exact + noise, network, 4.0)


def test_a_route_flips_where_the_gate_is_undecided_and_is_wrong_where_it_is_not() -> None:
    routes = gate(lambda: [[3.0, 2.0, 1.0, 0.0], [3.0, 1.0001, 1.0, 0.0]], 1e-3)
    assert routes.steady.tolist() == [True, False]
    both = routing_parity(np.array([True, True]), routes)
    assert (both.flips, both.wrong, both.unsteady) == (1, 1, 1)


def test_a_gate_that_is_undecided_everywhere_has_no_wrong_route() -> None:
    routes = gate(lambda: [[1.0, 1.0, 1.0, 1.0]] * 2, 1e-3)
    assert routes.steady.all()
    assert routing_parity(np.array([True, False]), routes).wrong == 0


def test_the_lowered_graph_may_not_fix_its_batch(shipped: Shipped) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(shipped[2])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    with pytest.raises((LoweringError, onnx.shape_inference.InferenceError)):
        check(fixed)


def test_every_part_of_a_sound_file_is_measured_where_it_ends(
    shipped: Shipped, probes: Tensor, tmp_path: Path
) -> None:
    network, program, model = shipped
    write(model, tmp_path / "model.onnx")
    found = part_drifts(tmp_path / "model.onnx", program, network.outputs, probes.numpy())
    assert [part.part for part in found if part.part.startswith("layer")] == [
        "layer1.0",
        "layer2.0",
        "layer3.0",
    ]
    assert all(0 <= part.drift < FLOORS * part.noise_floor for part in found)
    assert [part.part for part in found][-3:] == ["pooling.root: covariance", "pooling.root: triangle", "fc"]


def test_a_deep_network_is_measured_from_its_first_part_to_its_last() -> None:
    places = [Boundary(value=str(at), node=str(at), part=f"layer.{at}") for at in range(300)]
    chosen = spread_over_depth(places)
    assert len(chosen) == PARTS
    assert (chosen[0], chosen[-1]) == (places[0], places[-1])


def test_what_a_gate_leaves_out_in_both_is_no_difference() -> None:
    both = np.array([-np.inf, 1.0])
    assert farthest(both, both) == 0
    assert farthest(np.array([-np.inf, 1.5]), both) == 0.5
    assert farthest(np.array([0.0, 1.0]), both) == np.inf


def test_values_inside_a_bfloat16_file_are_those_of_the_file_as_it_is_compared(
    preprocess: Preprocess, probes: Tensor
) -> None:
    from tests.export.conftest import trained
    from tests.export.precision.test_precision import cast_graph

    model, _ = cast_graph(trained("isqrt-resnet8"), preprocess, "bf16-backbone")
    names = [node.output[0] for node in model.graph.node]
    found, plain = (run_file(model, names, probes.numpy()[:1], optimized=asked) for asked in (True, False))
    assert [name for name in names if not np.array_equal(found[name], plain[name])] == []
