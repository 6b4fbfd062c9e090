"""A convolution that an int8 runtime computes differently is named."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sopdeploy.bundle.manifest import BatchRange, Int8For
from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import Deployed, generated_images, operator_counts, write
from sopdeploy_export.parity.bisect_int8 import (
    Int8Graphs,
    convolution_values,
    find_first_int8_drift,
    part_drifts_int8,
)
from sopdeploy_export.parity.compare import compare, compute_reference
from sopdeploy_export.precision.casts import float32_parts
from sopdeploy_export.precision.convert import run_unfused
from sopdeploy_export.precision.int8 import quantize
from tests.conftest import no_vnni
from tests.export.once import graph_of

BATCH = BatchRange(optimum=4, maximum=9)
FLOORS = 4.0


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def graphs(request: pytest.FixtureRequest, preprocess: Preprocess) -> Int8Graphs:
    network, _, float32 = graph_of("isqrt-resnet8", preprocess, BATCH)
    copy = onnx.ModelProto.FromString(float32.SerializeToString())
    runtime: Int8For = request.param
    int8 = quantize(copy, generated_images(16), float32_parts(network), "percentile", runtime)
    return Int8Graphs(int8=int8, float32=float32)


@pytest.fixture
def exact_kernels(request: pytest.FixtureRequest) -> None:
    if (reason := no_vnni()) and "cpu" in request.node.callspec.id:
        pytest.skip(reason)


def saturated(model: onnx.ModelProto, part: str) -> onnx.ModelProto:
    """Copy *model* with the weights of *part* clipped to half their range, like a saturating kernel."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in other.graph.initializer:
        if tensor.name == f"{part}.weight_quantized":
            codes = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.clip(codes, -32, 32).astype(np.int8), tensor.name))
    return other


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("part", ["layer1.0.conv2", "layer2.0.conv1", "layer3.0.conv2"])
def test_a_wrong_convolution_is_named_with_the_option_to_use(
    graphs: Int8Graphs, preprocess: Preprocess, tmp_path: Path, part: str
) -> None:
    from tests.export.conftest import trained

    images, path = generated_images(16), tmp_path / "model.onnx"
    write(saturated(graphs.int8, part), path)
    network = Deployed(trained("isqrt-resnet8"), preprocess).eval()
    expected = compute_reference(network, images, run_unfused(graphs.int8), "int8")

    def locate(file: Path) -> str | None:
        return find_first_int8_drift(file, graphs, images, FLOORS)

    with pytest.raises(ParityError, match=rf"over its noise floor is {part} .*try --keep-float {part};"):
        compare(path, expected, images, BATCH, operator_counts(graphs.int8), locate=locate)


@pytest.mark.usefixtures("exact_kernels")
def test_a_correct_int8_file_drifts_nowhere(graphs: Int8Graphs, tmp_path: Path) -> None:
    write(graphs.int8, tmp_path / "model.onnx")
    assert find_first_int8_drift(tmp_path / "model.onnx", graphs, generated_images(16), FLOORS) is None


def test_the_drift_from_float32_grows_at_the_module_that_int8_damages(
    graphs: Int8Graphs, preprocess: Preprocess, tmp_path: Path
) -> None:
    network, program, _ = graph_of("isqrt-resnet8", preprocess, BATCH)
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
