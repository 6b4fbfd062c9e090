"""Errors injected into the exported file are detected, and the module is named, also in int8."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import Tensor
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import Int8For
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph import Deployed, check, generated_images, operator_counts, write
from sopdeploy_export.parity.bisect_int8 import (
    Int8Graphs,
    convolution_values,
    find_first_int8_drift,
    part_drifts_int8,
)
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
from sopdeploy_export.precision.casts import float32_parts
from sopdeploy_export.precision.convert import run_unfused
from sopdeploy_export.precision.int8 import quantize
from tests.export.conftest import trained
from tests.export.once import BATCH, graph_of
from tests.export.precision.test_precision import cast_graph

INT8_FLOORS = 4.0
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


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def graphs(request: pytest.FixtureRequest, preprocess: Preprocess) -> Int8Graphs:
    network, _, float32 = graph_of("isqrt-resnet8", preprocess)
    copy = onnx.ModelProto.FromString(float32.SerializeToString())
    runtime: Int8For = request.param
    int8 = quantize(copy, generated_images(16), float32_parts(network), "percentile", runtime)
    return Int8Graphs(int8=int8, float32=float32)


def saturated(model: onnx.ModelProto, part: str) -> onnx.ModelProto:
    """Copy *model* with the weights of *part* clipped to half their range, like a saturating kernel."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in other.graph.initializer:
        if tensor.name == f"{part}.weight_quantized":
            codes = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.clip(codes, -32, 32).astype(np.int8), tensor.name))
    return other


@pytest.mark.parametrize("part", ["layer1.0.conv2", "layer2.0.conv1", "layer3.0.conv2"])
def test_a_wrong_convolution_is_named_with_the_option_to_use(
    graphs: Int8Graphs, preprocess: Preprocess, tmp_path: Path, part: str
) -> None:
    images, path = generated_images(16), tmp_path / "model.onnx"
    write(saturated(graphs.int8, part), path)
    network = Deployed(trained("isqrt-resnet8"), preprocess).eval()
    expected = compute_reference(network, images, run_unfused(graphs.int8), "int8")

    def locate(file: Path) -> str | None:
        return find_first_int8_drift(file, graphs, images, INT8_FLOORS)

    with pytest.raises(ParityError, match=rf"over its noise floor is {part} .*try --keep-float {part};"):
        compare(path, expected, images, BATCH, operator_counts(graphs.int8), locate=locate)


def test_a_correct_int8_file_drifts_nowhere(graphs: Int8Graphs, tmp_path: Path) -> None:
    write(graphs.int8, tmp_path / "model.onnx")
    assert find_first_int8_drift(tmp_path / "model.onnx", graphs, generated_images(16), INT8_FLOORS) is None


def test_the_drift_from_float32_grows_at_the_module_that_int8_damages(
    graphs: Int8Graphs, preprocess: Preprocess, tmp_path: Path
) -> None:
    network, program, _ = graph_of("isqrt-resnet8", preprocess)
    shares = []
    for model in (graphs.int8, saturated(graphs.int8, "layer2.0.conv1")):
        write(model, tmp_path / "model.onnx")
        found = part_drifts_int8(
            tmp_path / "model.onnx", graphs, program, network.outputs, generated_images(16)
        )
        shares.append({part.part: part.share for part in found})
    correct, damaged = shares
    assert list(correct)[-3:] == ["pooling.root: covariance", "pooling.root: triangle", "fc"]
    before, after = (("normalise", "relu", "layer1.0"), ("layer2.0", "layer3.0", "fc"))
    assert all(damaged[part] == pytest.approx(correct[part], rel=0.2) for part in before)
    assert all(damaged[part] > 2 * correct[part] for part in after)


def test_every_int8_convolution_is_read_in_graph_order(graphs: Int8Graphs) -> None:
    places = [part for part, _ in convolution_values(graphs.int8).values()]
    assert places == sorted(places)
    assert len(places) in {6, 7}  # without or with the convolution that reads the image
    assert places[-1] == "layer3.0.conv2"
