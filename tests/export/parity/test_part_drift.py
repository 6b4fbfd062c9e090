"""The drift of modules is measured, and a module that drifts too far is named."""

from pathlib import Path

import onnx
import pytest
from onnx import helper
from torch import Tensor

from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import Deployed, check, operator_counts, write
from sopdeploy_export.parity.compare import compare, compute_reference
from sopdeploy_export.parity.part_drift import MAX_PARTS, ModuleOutput, evenly_spaced, part_drifts
from sopdeploy_export.parity.report import FLOORS
from tests.export.once import BATCH, Graph, graph_of


@pytest.fixture(scope="module")
def exported(preprocess: Preprocess) -> Graph:
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


@pytest.mark.parametrize(("value", "module"), [("matmul_4", "pooling"), ("relu_3", "layer2.0")])
def test_the_first_module_that_drifts_too_far_is_named(
    exported: Graph, preprocess: Preprocess, probes: Tensor, tmp_path: Path, value: str, module: str
) -> None:
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(rounded_to_tf32(exported.model, value), path)
    expected = compute_reference(Deployed(exported.network, preprocess).eval(), images)
    parts = part_drifts(path, exported.program, exported.network.outputs, images)
    with pytest.raises(ParityError, match=rf"the first module over its limit is {module}"):
        compare(path, expected, images, BATCH, operator_counts(exported.model), parts=parts)


def test_a_correct_file_drifts_nowhere_and_every_module_is_measured(
    exported: Graph, probes: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    write(exported.model, path)
    parts = part_drifts(path, exported.program, exported.network.outputs, probes.numpy())
    assert [part.part for part in parts][-5:] == [
        "layer1.0",
        "layer2.0",
        "layer3.0",
        "pooling.root",
        "fc",
    ]
    assert all(0 <= part.drift < FLOORS * part.noise_floor for part in parts)


def test_a_fixed_batch_axis_is_rejected(
    exported: Graph, preprocess: Preprocess, probes: Tensor, tmp_path: Path
) -> None:
    path, images = tmp_path / "model.onnx", probes.numpy()
    write(with_fixed_batch(exported.model, 1), path)
    expected = compute_reference(Deployed(exported.network, preprocess).eval(), images)
    with pytest.raises(ParityError, match="rejects a batch of 2"):
        compare(path, expected, images, BATCH, operator_counts(exported.model))
    with pytest.raises((LoweringError, onnx.shape_inference.InferenceError)):
        check(with_fixed_batch(exported.model, 3))


def test_modules_of_a_deep_network_are_sampled_from_first_to_last() -> None:
    modules = [ModuleOutput(f"layer.{index}", str(index), str(index)) for index in range(300)]
    chosen = evenly_spaced(modules)
    assert len(chosen) == MAX_PARTS
    assert (chosen[0], chosen[-1]) == (modules[0], modules[-1])
