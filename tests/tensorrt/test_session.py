"""Overlapping batches get their own outputs, also after failures.

The simulated GPU runs everything as late as possible.
"""

import asyncio
import gc
import sys

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy_commands.bundles.engine_builder.engine import get_engine
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model_worker import LocalModel
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.runtime.base import OverlappingRuntime
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.conftest import simulate
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import network, outputs_of, some_images, write

SIZES = (1, 5, 2, 8, 8, 1, 1, 2, 3)
NETWORK = network()
SETTINGS = Settings(runtime="tensorrt")
pytestmark = pytest.mark.usefixtures("trt")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Exclude what earlier tests left, from the collections of these tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an engine for the profiles 1, 2 and 3 to 8."""
    bundle = write(tmp_path_factory.mktemp("built"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda())
        simulate(patch, "11.1")
        get_engine(bundle, EngineOptions(profiles="1,2,8"))
    return bundle


@pytest.fixture
def runtime(built: Bundle, trt: FakeTensorRT) -> TensorRTRuntime:
    return TensorRTRuntime(built, SETTINGS)


def batch(number: int, size: int) -> np.ndarray:
    return np.roll(some_images(size), 7 * number, axis=2)


def check_outputs(found: dict[str, np.ndarray], images: np.ndarray) -> None:
    np.testing.assert_allclose(
        found["logits"], outputs_of(NETWORK, images), rtol=1e-4, atol=1e-3
    )


def test_overlapping_batches_give_their_own_outputs(runtime: TensorRTRuntime) -> None:
    assert isinstance(runtime, OverlappingRuntime)
    ends = []
    for number, size in enumerate(SIZES):
        images = batch(number, size)
        ends.append(runtime.begin(list(images)))
        images[:] = 0  # they are copied already
        if number:
            check_outputs(ends[number - 1](), batch(number - 1, SIZES[number - 1]))
    check_outputs(ends[-1](), batch(len(SIZES) - 1, SIZES[-1]))


def test_a_batch_that_fails_to_begin_does_not_affect_the_other(
    runtime: TensorRTRuntime, trt: FakeTensorRT
) -> None:
    end = runtime.begin(list(batch(0, 5)))
    trt._faults.add("fails")
    for _ in range(5):
        with pytest.raises(RuntimeError, match="cannot run the batch"):
            runtime.begin(list(batch(1, 5)))
    trt._faults.clear()
    following = runtime.begin(list(batch(2, 5)))
    check_outputs(end(), batch(0, 5))
    check_outputs(following(), batch(2, 5))


def held_by(cuda: FakeCuda, trt: FakeTensorRT) -> tuple[int, ...]:
    return (*map(len, (cuda.held, cuda.streams, cuda.events)), len(trt._contexts))


def test_a_replaced_model_releases_its_engine(
    built: Bundle, cuda: FakeCuda, trt: FakeTensorRT
) -> None:
    for _ in range(3):
        model = LocalModel("tiny", load_model(built.path, SETTINGS), SETTINGS, Metrics())

        async def serve_and_stop(model: LocalModel = model) -> None:
            model.start()
            await model.stop()

        asyncio.run(serve_and_stop())
        assert held_by(cuda, trt) == (0, 0, 0, 0)
        model._runtime.close()  # a second time


FAILED_OPENS = {
    "a profile": (
        "no profile",
        "",
        "TensorRT cannot run profile 1: Error in set optimization profile async",
    ),
    "memory": ("", "cudaMalloc", "cudaHostAlloc failed"),
    "a probe": ("fails", "", "cannot run the batch"),
}


@pytest.mark.parametrize("case", FAILED_OPENS)
def test_a_model_that_fails_to_load_holds_nothing(
    built: Bundle, cuda: FakeCuda, trt: FakeTensorRT, case: str
) -> None:
    fault, function, message = FAILED_OPENS[case]
    trt._faults.add(fault)
    cuda.broken.add(function)
    with pytest.raises(Exception, match=message):
        load_model(built.path, SETTINGS)
    gc.collect()  # the traceback knows methods of the simulated contexts
    assert held_by(cuda, trt) == (0, 0, 0, 0)


def test_an_engine_on_a_failing_gpu_reports_the_cuda_error(
    runtime: TensorRTRuntime, trt: FakeTensorRT, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt._faults.add("fails")
    failed = type("Status", (int,), {"name": "cudaErrorLaunchFailure"})(719)
    for function in ("cudaStreamSynchronize", "cudaEventSynchronize"):
        monkeypatch.setattr(cuda, function, lambda _: (failed,))
    with pytest.raises(Exception, match=r"^CUDA\b.*cudaErrorLaunchFailure"):
        runtime.run(some_images(1))
