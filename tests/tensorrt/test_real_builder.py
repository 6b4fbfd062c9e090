"""Our builder code with a real TensorRT parser and builder, TensorRT-RTX; see tests/gpu_graphs.py."""

from types import SimpleNamespace

import onnx
import pytest
from onnx import helper

from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.binding import create, make_logger
from sopdeploy.tensorrt.cache import Profile
from sopdeploy_export.engine_builder.build import BuildRequest, parse_and_build, set_timing_cache
from sopdeploy_export.engine_builder.lint import lint
from tests.gpu_graphs import ABSENT, RealTensorRT, real_tensorrt
from tests.tensorrt.networks import network

PROFILES = (Profile(minimum=1, optimum=1, maximum=1), Profile(minimum=2, optimum=4, maximum=16))


@pytest.fixture
def trt() -> RealTensorRT:
    found = real_tensorrt()
    if found is None:
        pytest.skip(ABSENT)
    return found


def request(model: onnx.ModelProto, **options: object) -> BuildRequest:
    return BuildRequest(onnx=model.SerializeToString(), profiles=PROFILES, **options)


@pytest.mark.parametrize("half", [False, True])
def test_the_linted_graph_builds_and_the_raw_one_fails_at_its_unsigned_bytes(
    trt: RealTensorRT, half: bool
) -> None:
    told: list[str] = []
    safe, _ = lint(network(half=half), PROFILES)
    assert parse_and_build(trt, request(safe), told.append)[0]
    assert told
    with pytest.raises(EngineError, match=r"node 0 \(Transpose node_moved\): Invalid Node.*UInt8") as caught:
        parse_and_build(trt, request(network()), told.append)
    assert "\n" not in str(caught.value)


def test_a_parser_error_names_the_operator_also_beside_another_builder(trt: RealTensorRT) -> None:
    other = create(trt, "Builder", make_logger(trt))  # TensorRT ignores the logger of the second builder
    safe, _ = lint(network(), PROFILES)
    safe.graph.node.append(helper.make_node("Det", ["covariance"], ["unused"], name="determinant"))
    with pytest.raises(EngineError, match=r"cannot read the graph: node 13 \(Det determinant\)"):
        parse_and_build(trt, request(safe), lambda _: None)
    damaged = BuildRequest(onnx=b"no graph", profiles=PROFILES)
    with pytest.raises(EngineError, match=r"cannot read the graph: .+") as caught:
        parse_and_build(trt, damaged, lambda _: None)
    assert "gave no reason" not in str(caught.value)
    del other


def test_control_c_stops_a_build(trt: RealTensorRT) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    safe, _ = lint(network(), PROFILES)
    with pytest.raises(KeyboardInterrupt):
        parse_and_build(trt, request(safe), interrupt)


@pytest.mark.parametrize("rejected", ["damaged", "of another machine"])
def test_a_timing_cache_that_tensorrt_rejects_is_ignored(rejected: str) -> None:
    """TensorRT-RTX has no timing cache."""
    used: list[str] = []

    def set_one(cache: str, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        used.append(cache)
        return cache != "of another machine"

    create = {b"damaged": None}.get
    config = SimpleNamespace(
        create_timing_cache=lambda content: create(content, content.decode()), set_timing_cache=set_one
    )
    set_timing_cache(config, rejected.encode())
    assert used[-1] == ""
