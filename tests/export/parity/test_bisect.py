"""Errors injected into the exported file are detected, and the module is named."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from torch import Tensor
from torch.export import ExportedProgram

from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph import Deployed, check, operator_counts, write
from sopdeploy_export.parity.compare import compare, compute_reference
from sopdeploy_export.parity.onnx_file import (
    MAX_PARTS,
    Boundary,
    difference,
    find_first_drift,
    part_drifts,
    run_file,
    select_parts,
)
from sopdeploy_export.parity.report import FLOORS
from tests.export.conftest import trained
from tests.export.once import BATCH, graph_of
from tests.export.precision.test_precision import cast_graph

Exported = tuple[Classifier, ExportedProgram, onnx.ModelProto]


@pytest.fixture(scope="module")
def exported(preprocess: Preprocess) -> Exported:
    return graph_of("isqrt-resnet8", preprocess)


def rounded_to_tf32(model: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """Copy *model* with *value* rounded to a 10-bit mantissa, as TF32 products are, by casts to float16."""
    noisy = onnx.ModelProto.FromString(model.SerializeToString())
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


def with_fixed_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("matmul_4", "pooling.root: iteration 3"),
        ("baddbmm_2", "pooling.root: iteration 4"),
        ("matmul", "pooling.root: covariance"),
        ("relu_3", "layer2.0"),
    ],
)
def test_tf32_noise_is_detected_and_its_module_is_named(
    exported: Exported, preprocess: Preprocess, probes: Tensor, tmp_path: Path, value: str, part: str
) -> None:
    network, program, model = exported
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(rounded_to_tf32(model, value), path)
    expected = compute_reference(Deployed(network, preprocess).eval(), images)

    def locate(file: Path) -> str | None:
        return find_first_drift(file, program, network.outputs, images, FLOORS)

    with pytest.raises(ParityError, match=rf"over its noise floor is {part}"):
        compare(path, expected, images, BATCH, operator_counts(model), locate=locate)


def test_a_correct_file_drifts_nowhere_and_every_module_is_measured(
    exported: Exported, probes: Tensor, tmp_path: Path
) -> None:
    network, program, model = exported
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(model, path)
    assert find_first_drift(path, program, network.outputs, images, FLOORS) is None
    found = part_drifts(path, program, network.outputs, images)
    parts = [part.part for part in found]
    assert [part for part in parts if part.startswith("layer")] == ["layer1.0", "layer2.0", "layer3.0"]
    assert parts[-3:] == ["pooling.root: covariance", "pooling.root: triangle", "fc"]
    assert all(0 <= part.drift < FLOORS * part.noise_floor for part in found)


def test_a_fixed_batch_axis_is_rejected(
    exported: Exported, preprocess: Preprocess, probes: Tensor, tmp_path: Path
) -> None:
    network, _, model = exported
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(with_fixed_batch(model, 1), path)
    expected = compute_reference(Deployed(network, preprocess).eval(), images)
    with pytest.raises(ParityError, match="rejects a batch of 2"):
        compare(path, expected, images, BATCH, operator_counts(model))
    with pytest.raises((LoweringError, onnx.shape_inference.InferenceError)):
        check(with_fixed_batch(model, 3))


def test_modules_of_a_deep_network_are_sampled_from_first_to_last() -> None:
    places = [Boundary(value=str(at), node=str(at), part=f"layer.{at}") for at in range(300)]
    chosen = select_parts(places)
    assert len(chosen) == MAX_PARTS
    assert (chosen[0], chosen[-1]) == (places[0], places[-1])


def test_equal_infinities_are_no_difference() -> None:
    masked = np.array([-np.inf, 1.0])
    assert difference(masked, masked).tolist() == [0, 0]
    assert difference(np.array([-np.inf, 1.5]), masked).tolist() == [0, 0.5]
    assert difference(np.array([0.0, 1.0]), masked).tolist() == [np.inf, 0]


@pytest.mark.slow
def test_inner_values_of_a_bfloat16_file_do_not_depend_on_graph_optimizations(
    preprocess: Preprocess, probes: Tensor
) -> None:
    model, _ = cast_graph(trained("isqrt-resnet8"), preprocess, "bf16-backbone")
    names = [node.output[0] for node in model.graph.node]
    found, plain = (run_file(model, names, probes.numpy()[:1], optimized=asked) for asked in (True, False))
    assert [name for name in names if not np.array_equal(found[name], plain[name])] == []
