"""CUDA graphs of an engine: the same numbers by one call, and never an engine lost to a graph."""

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import answers, network, some_images

GRAPHS = Settings(runtime="tensorrt", cuda_graphs=True)


@pytest.fixture
def built(trt: FakeTensorRT, bundle: Bundle) -> Bundle:
    """The bundle with an engine of the profiles 1, 2 and 3 to 8, for every release."""
    get_engine(bundle, EngineOptions(profiles="1,2,8"))
    return bundle


def right(runtime: TensorRTRuntime, count: int) -> None:
    images = some_images(count)
    expected = answers(network(), images)
    np.testing.assert_allclose(runtime.run(images)["logits"], expected, rtol=1e-4, atol=1e-3)


def captured(runtime: TensorRTRuntime) -> list[str]:
    return [str(profile) for profile in runtime._session.captured]


def test_profiles_of_one_size_become_graphs_and_give_the_same_numbers(built: Bundle, cuda: FakeCuda) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    for count in (1, 5, 1, 2, 8, 2, 1, 3):
        right(runtime, count)
    assert captured(runtime) == ["1", "2"]
    assert cuda.launched == 3  # the first run of each size is without
    assert len(cuda.graphs) == 4  # of each profile one for each slot of memory


def test_without_the_setting_there_is_no_graph(built: Bundle, cuda: FakeCuda) -> None:
    runtime = TensorRTRuntime(built, Settings(runtime="tensorrt"))
    for _ in range(3):
        right(runtime, 1)
    assert (cuda.launched, cuda.graphs) == (0, {})


def test_a_graph_sees_the_images_of_its_own_batch(built: Bundle) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    images = some_images(3)
    found = [runtime.run(image[None])["logits"] for image in images]
    np.testing.assert_allclose(np.concatenate(found), answers(network(), images), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_what_cannot_be_captured_runs_as_before(
    built: Bundle, cuda: FakeCuda, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.broken.add(function)
    runtime = TensorRTRuntime(built, GRAPHS)
    for _ in range(3):
        right(runtime, 1)
    assert (captured(runtime), cuda.graphs, cuda.recording) == ([], {}, None)
    assert [record.message[:42] for record in caplog.records] == [
        "profile 1 runs without a CUDA graph: CUDA:"
    ]


def test_an_engine_that_fails_while_it_is_captured_ends_the_capture(
    built: Bundle, cuda: FakeCuda, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    whole = cuda.cudaStreamBeginCapture

    def begin(*given: int) -> object:
        trt._sabotage.add("fails")
        return whole(*given)

    monkeypatch.setattr(cuda, "cudaStreamBeginCapture", begin)
    right(runtime, 1)
    trt._sabotage.clear()
    right(runtime, 1)
    assert (captured(runtime), cuda.recording) == ([], None)


def test_a_graph_that_fails_costs_its_batch_and_the_next_runs_without(built: Bundle, cuda: FakeCuda) -> None:
    runtime = TensorRTRuntime(built, GRAPHS)
    right(runtime, 1)
    right(runtime, 2)
    cuda.broken.add("cudaGraphLaunch")
    with pytest.raises(RuntimeError, match="the CUDA graph of profile 1 failed"):
        runtime.run(some_images(1))
    right(runtime, 1)
    right(runtime, 1)
    assert captured(runtime) == ["2"]
    assert len(cuda.graphs) == 2


def test_at_the_end_nothing_is_held(built: Bundle, cuda: FakeCuda) -> None:
    before = dict(cuda.held), dict(cuda.streams), dict(cuda.events)
    runtime = TensorRTRuntime(built, GRAPHS)
    right(runtime, 1)
    assert cuda.graphs
    runtime._session.close()
    assert (cuda.held, cuda.streams, cuda.events) == before
    assert cuda.graphs == {}


def test_the_probes_of_the_start_run_through_the_graph(built: Bundle, cuda: FakeCuda) -> None:
    load_model(built.path, GRAPHS)
    assert cuda.launched == 1  # of two single probes the first is captured
