"""CUDA graphs give the same outputs, and a failing graph never loses the engine."""

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import network, outputs_of, some_images

GRAPHS = Settings(runtime="tensorrt", cuda_graphs=True)


@pytest.fixture
def built(trt: FakeTensorRT, bundle: Bundle) -> Bundle:
    """A bundle with an engine for the profiles 1, 2 and 3 to 8, for every release."""
    get_engine(bundle, EngineOptions(profiles="1,2,8"))
    return bundle


def check_outputs(runtime: TensorRTRuntime, count: int) -> None:
    images = some_images(count)
    expected = outputs_of(network(), images)
    np.testing.assert_allclose(runtime.run(images)["logits"], expected, rtol=1e-4, atol=1e-3)


def captured_profiles(runtime: TensorRTRuntime) -> list[str]:
    session = runtime._session
    return [str(session._profiles[index]) for index in sorted({index for index, _ in session._graphs})]


def test_profiles_of_one_batch_size_become_graphs_with_the_same_outputs(
    built: Bundle, cuda: FakeCuda
) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    for count in (1, 5, 1, 2, 8, 2, 1, 3):
        check_outputs(runtime, count)
    assert captured_profiles(runtime) == ["1", "2"]
    assert cuda.launched == 3  # the first run of each size is without
    assert len(cuda.graphs) == 4  # of each profile one for each slot of memory


def test_nothing_is_captured_without_the_setting(built: Bundle, cuda: FakeCuda) -> None:
    runtime = TensorRTRuntime(built, Settings(runtime="tensorrt"))
    for _ in range(3):
        check_outputs(runtime, 1)
    assert (cuda.launched, cuda.graphs) == (0, {})


def test_a_graph_reads_the_images_of_its_own_batch(built: Bundle) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    images = some_images(3)
    found = [runtime.run(image[None])["logits"] for image in images]
    np.testing.assert_allclose(np.concatenate(found), outputs_of(network(), images), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_profile_that_cannot_be_captured_runs_without_a_graph(
    built: Bundle, cuda: FakeCuda, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.broken.add(function)
    runtime = TensorRTRuntime(built, GRAPHS)
    for _ in range(3):
        check_outputs(runtime, 1)
    assert (captured_profiles(runtime), cuda.graphs, cuda.recording) == ([], {}, None)
    assert [record.message[:42] for record in caplog.records] == [
        "profile 1 runs without a CUDA graph: CUDA:"
    ]


def test_an_engine_that_fails_during_capture_ends_the_capture(
    built: Bundle, cuda: FakeCuda, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    whole = cuda.cudaStreamBeginCapture

    def begin(*given: int) -> object:
        trt._faults.add("fails")
        return whole(*given)

    monkeypatch.setattr(cuda, "cudaStreamBeginCapture", begin)
    check_outputs(runtime, 1)
    trt._faults.clear()
    check_outputs(runtime, 1)
    assert (captured_profiles(runtime), cuda.recording) == ([], None)


def test_after_a_failed_graph_launch_the_profile_runs_without_a_graph(built: Bundle, cuda: FakeCuda) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    check_outputs(runtime, 1)
    check_outputs(runtime, 2)
    cuda.broken.add("cudaGraphLaunch")
    with pytest.raises(RuntimeError, match="the CUDA graph of profile 1 failed"):
        runtime.run(some_images(1))
    check_outputs(runtime, 1)
    check_outputs(runtime, 1)
    assert captured_profiles(runtime) == ["2"]
    assert len(cuda.graphs) == 2


def test_closing_the_session_frees_everything(built: Bundle, cuda: FakeCuda) -> None:
    before = dict(cuda.held), dict(cuda.streams), dict(cuda.events)
    runtime = TensorRTRuntime(built, GRAPHS)
    check_outputs(runtime, 1)
    assert cuda.graphs
    runtime._session.close()
    assert (cuda.held, cuda.streams, cuda.events) == before
    assert cuda.graphs == {}


def test_the_startup_probes_run_through_the_graph(built: Bundle, cuda: FakeCuda) -> None:
    load_model(built.path, GRAPHS)
    assert cuda.launched == 1  # of two single probes the first is captured
