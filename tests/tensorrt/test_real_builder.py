"""Our builder code with a real TensorRT parser and builder, TensorRT-RTX; see tests/gpu_graphs.py."""

import signal
from collections.abc import Callable

import onnx
import pytest
from onnx import helper

from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import create, make_logger
from sopdeploy.tensorrt.cache import Profile
from sopdeploy_export.engine_builder.build import parse_and_build
from sopdeploy_export.engine_builder.lint import lint
from tests.gpu_graphs import ABSENT, WORKSPACE, RealTensorRT, real_tensorrt
from tests.tensorrt.networks import network

PROFILES = (Profile(minimum=1, maximum=1), Profile(minimum=2, maximum=16))


@pytest.fixture
def trt() -> RealTensorRT:
    found = real_tensorrt()
    if found is None:
        pytest.skip(ABSENT)
    return found


def build(trt: RealTensorRT, model: onnx.ModelProto | bytes, report: Callable[[str], None]) -> bytes:
    graph = model if isinstance(model, bytes) else model.SerializeToString()
    return parse_and_build(trt, graph, PROFILES, WORKSPACE, report)


@pytest.mark.parametrize("half", [False, True])
def test_the_linted_graph_builds_and_the_raw_one_fails_at_its_unsigned_bytes(
    trt: RealTensorRT, half: bool
) -> None:
    told: list[str] = []
    safe = lint(network(half=half))
    assert build(trt, safe, told.append)
    assert told
    with pytest.raises(EngineError, match=r"node 0 \(Transpose node_moved\): Invalid Node.*UInt8") as caught:
        build(trt, network(), told.append)
    assert "\n" not in str(caught.value)


def test_a_parser_error_names_the_operator_also_beside_another_builder(trt: RealTensorRT) -> None:
    other = create(trt, "Builder", make_logger(trt))  # TensorRT ignores the logger of the second builder
    safe = lint(network())
    safe.graph.node.append(helper.make_node("Det", ["covariance"], ["unused"], name="determinant"))
    with pytest.raises(EngineError, match=r"cannot read the graph: node 13 \(Det determinant\)"):
        build(trt, safe, lambda _: None)
    with pytest.raises(EngineError, match=r"cannot read the graph: .+") as caught:
        build(trt, b"no graph", lambda _: None)
    assert "gave no reason" not in str(caught.value)
    del other


def test_control_c_stops_a_build(trt: RealTensorRT) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            build(trt, lint(network()), lambda _: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
