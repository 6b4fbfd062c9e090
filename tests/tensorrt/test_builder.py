"""The casts of images move to the input; a real parser and builder, TensorRT-RTX, accept the result.

See tests/support/gpu_graphs.py.
"""

import signal
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sopdeploy.errors import EngineError, LoweringError
from sopdeploy_commands.engine_builder.build import cast_images_first, parse_and_build
from sopdeploy_service.runtime.tensorrt_cache import Profile
from sopdeploy_service.runtime.tensorrt_session import create, reset_logger
from tests.support.gpu_graphs import ABSENT, WORKSPACE, RealTensorRT, real_tensorrt
from tests.tensorrt.networks import CHANNELS, network, outputs_of, some_images

PROFILES = (Profile(minimum=1, maximum=1), Profile(minimum=2, maximum=16))


@pytest.fixture
def trt() -> RealTensorRT:
    found = real_tensorrt()
    if found is None:
        pytest.skip(ABSENT)
    return found


def build(
    trt: RealTensorRT, model: onnx.ModelProto | bytes, report: Callable[[str], None]
) -> bytes:
    graph = model if isinstance(model, bytes) else model.SerializeToString()
    return parse_and_build(trt, graph, PROFILES, WORKSPACE, report)


@pytest.mark.parametrize("half", [False, True])
def test_the_linted_graph_builds_and_the_raw_one_fails(trt: RealTensorRT, half: bool) -> None:
    told = list[str]()
    model = network(half=half)
    images = some_images(5)
    before = model.SerializeToString()
    safe = cast_images_first(model)
    assert model.SerializeToString() == before

    np.testing.assert_allclose(
        outputs_of(safe, images), outputs_of(model, images), rtol=1e-6, atol=1e-4
    )
    assert build(trt, safe, told.append)
    assert told

    with pytest.raises(EngineError, match="node_moved") as caught:
        build(trt, network(), told.append)

    assert "\n" not in str(caught.value)


def test_a_parser_error_names_the_operator_also_beside_another_builder(
    trt: RealTensorRT,
) -> None:
    # TensorRT ignores the logger of the second builder
    other = create(trt, "Builder", reset_logger(trt))
    safe = cast_images_first(network())
    safe.graph.node.append(
        helper.make_node("Det", ["covariance"], ["unused"], name="determinant")
    )

    with pytest.raises(EngineError, match=r"node 13 \(Det"):
        build(trt, safe, lambda _: None)
    with pytest.raises(EngineError, match=r"the graph: .+") as caught:
        build(trt, b"no graph", lambda _: None)

    assert "gave no reason" not in str(caught.value)
    del other


def test_control_c_stops_a_build(trt: RealTensorRT) -> None:
    # Background processes ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(
                trt, cast_images_first(network()), lambda _: signal.raise_signal(signal.SIGINT)
            )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_shape_of_the_images_is_taken_after_their_cast() -> None:
    model = network()
    images = some_images(5)
    dynamic = helper.make_node("Shape", ["images"], ["count"], name="count", start=0, end=1)
    rest = numpy_helper.from_array(np.array([CHANNELS, -1]), "rest")
    rows = helper.make_node("Concat", ["count", "rest"], ["rows"], name="rows", axis=0)
    del model.graph.initializer[3]
    model.graph.initializer.append(rest)
    for node in (rows, dynamic):
        model.graph.node.insert(0, node)
    safe = cast_images_first(model)
    users = {node.op_type for node in safe.graph.node if "images" in node.input}

    assert users == {"Cast"}
    np.testing.assert_array_equal(outputs_of(safe, images), outputs_of(model, images))


def test_other_uses_of_unsigned_bytes_are_rejected() -> None:
    model = network()
    model.graph.node.insert(0, helper.make_node("Add", ["images", "images"], ["doubled"]))

    with pytest.raises(LoweringError, match=r"Add .*unsigned bytes"):
        cast_images_first(model)
