"""Sabotage in an int8 file: the convolution that a runtime computes otherwise is named."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sopdeploy.bundle.manifest import BatchRange, Int8For
from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph.onnx_export import operator_counts, write
from sopdeploy_export.graph.probe_images import generated_images
from sopdeploy_export.graph.torch_export import Deployed
from sopdeploy_export.parity.bisect_int8 import (
    Int8Graphs,
    convolution_values,
    find_first_int8_drift,
    part_drifts_int8,
)
from sopdeploy_export.parity.compare import compare
from sopdeploy_export.parity.reference import compute_reference
from sopdeploy_export.precision.casts import float32_parts
from sopdeploy_export.precision.convert import run_unfused
from sopdeploy_export.precision.int8 import quantize
from tests.export.once import graph_of

BATCH = BatchRange(optimum=4, maximum=9)
FLOORS = 4.0


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def graphs(request: pytest.FixtureRequest, preprocess: Preprocess) -> tuple[onnx.ModelProto, ...]:
    """An iSQRT network as float32 and as int8."""
    network, _, plain = graph_of("isqrt-resnet8", preprocess, BATCH)
    copy = onnx.ModelProto.FromString(plain.SerializeToString())
    runtime: Int8For = request.param
    return plain, quantize(copy, generated_images(16), float32_parts(network), "percentile", runtime)


def saturated(model: onnx.ModelProto, part: str) -> onnx.ModelProto:
    """Return *model* with the codes of *part* cut off at half their range, as a kernel without room would."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in other.graph.initializer:
        if tensor.name == f"{part}.weight_quantized":
            codes = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.clip(codes, -32, 32).astype(np.int8), tensor.name))
    return other


@pytest.mark.parametrize("part", ["layer1.0.conv2", "layer2.0.conv1", "layer3.0.conv2"])
def test_a_convolution_that_is_computed_otherwise_is_named_with_the_switch(
    graphs: tuple[onnx.ModelProto, ...], preprocess: Preprocess, tmp_path: Path, part: str
) -> None:
    from tests.export.conftest import trained

    plain, sound = graphs
    images, path = generated_images(16), tmp_path / "model.onnx"
    write(saturated(sound, part), path)
    network = Deployed(trained("isqrt-resnet8"), preprocess).eval()
    expected = compute_reference(network, images, run_unfused(sound), "int8")

    def locate(file: Path) -> str | None:
        return find_first_int8_drift(file, Int8Graphs(int8=sound, float32=plain), images, FLOORS)

    with pytest.raises(ParityError, match=rf"over its floor is {part} .*try --keep-float {part};"):
        compare(path, expected, images, BATCH, operator_counts(sound), locate=locate)


def test_a_sound_file_is_off_nowhere(graphs: tuple[onnx.ModelProto, ...], tmp_path: Path) -> None:
    plain, sound = graphs
    write(sound, tmp_path / "model.onnx")
    graphs_of = Int8Graphs(int8=sound, float32=plain)
    assert find_first_int8_drift(tmp_path / "model.onnx", graphs_of, generated_images(16), FLOORS) is None


def test_the_part_that_int8_spoils_is_where_the_distance_from_float32_grows(
    graphs: tuple[onnx.ModelProto, ...], preprocess: Preprocess, tmp_path: Path
) -> None:
    network, program, _ = graph_of("isqrt-resnet8", preprocess, BATCH)
    pair = Int8Graphs(int8=graphs[1], float32=graphs[0])
    shares = {}
    for name, model in (("sound", graphs[1]), ("spoilt", saturated(graphs[1], "layer2.0.conv1"))):
        write(model, tmp_path / f"{name}.onnx")
        found = part_drifts_int8(
            tmp_path / f"{name}.onnx", pair, program, network.outputs, generated_images(16)
        )
        shares[name] = {part.part: part.share for part in found}
    assert list(shares["sound"])[-3:] == ["pooling.root: covariance", "pooling.root: triangle", "fc"]
    before, after = (("normalise", "relu", "layer1.0"), ("layer2.0", "layer3.0", "fc"))
    assert all(shares["spoilt"][part] == pytest.approx(shares["sound"][part], rel=0.2) for part in before)
    assert all(shares["spoilt"][part] > 2 * shares["sound"][part] for part in after)


def test_what_is_read_is_behind_every_int8_convolution_in_order(
    graphs: tuple[onnx.ModelProto, ...],
) -> None:
    places = [part for part, _ in convolution_values(graphs[1]).values()]
    assert places == sorted(places)
    assert len(places) in {6, 7}  # without the convolution that reads the picture, and with it
    assert places[-1] == "layer3.0.conv2"
