"""Two batches overlap on an engine; the simulated GPU runs everything as late as possible."""

from collections.abc import Callable

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import ParityError
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from sopdeploy_service.inference.loader import replay_overlapping
from sopdeploy_service.runtime.base import OverlappingRuntime
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import network, outputs_of, some_images

SIZES = (1, 5, 2, 8, 8, 1, 1, 2, 3)


@pytest.fixture(params=[False, True], ids=["without graphs", "with graphs"])
def runtime(request: pytest.FixtureRequest, trt: FakeTensorRT, bundle: Bundle) -> TensorRTRuntime:
    get_engine(bundle, EngineOptions(profiles="1,2,8"))
    return TensorRTRuntime(bundle, Settings(runtime="tensorrt", cuda_graphs=request.param))


def batch(number: int, size: int) -> np.ndarray:
    return np.roll(some_images(size), 7 * number, axis=2)


def check_outputs(found: dict[str, np.ndarray], number: int, size: int) -> None:
    expected = outputs_of(network(), batch(number, size))
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-3)


def test_overlapping_batches_give_their_own_outputs(runtime: TensorRTRuntime) -> None:
    assert isinstance(runtime, OverlappingRuntime)
    for size in (1, 2, 8):
        runtime.run(some_images(size))  # what can be a graph is one now
    ends = []
    for number, size in enumerate(SIZES):
        images = batch(number, size)
        ends.append(runtime.begin(list(images)))
        images[:] = 0  # they are copied already
        if number:
            check_outputs(ends[number - 1](), number - 1, SIZES[number - 1])
    check_outputs(ends[-1](), len(SIZES) - 1, SIZES[-1])


def test_a_third_batch_is_rejected_until_the_first_has_ended(runtime: TensorRTRuntime) -> None:
    ends = [runtime.begin(list(batch(number, 2))) for number in range(2)]
    with pytest.raises(RuntimeError, match="2 batches are in flight"):
        runtime.begin(list(batch(2, 2)))
    for number, end in enumerate(ends):
        check_outputs(end(), number, 2)
    check_outputs(runtime.run(batch(3, 2)), 3, 2)


@pytest.mark.parametrize("times", [1, 5])
def test_a_batch_that_fails_to_begin_does_not_affect_the_other(
    runtime: TensorRTRuntime, trt: FakeTensorRT, times: int
) -> None:
    end = runtime.begin(list(batch(0, 5)))
    trt._faults.add("fails")
    for _ in range(times):
        with pytest.raises(RuntimeError, match="cannot run the batch"):
            runtime.begin(list(batch(1, 5)))
    trt._faults.clear()
    following = runtime.begin(list(batch(2, 5)))
    check_outputs(end(), 0, 5)
    check_outputs(following(), 2, 5)


def test_a_batch_that_fails_at_its_end_affects_no_other(runtime: TensorRTRuntime, cuda: FakeCuda) -> None:
    ends = [runtime.begin(list(batch(number, 5))) for number in range(2)]
    cuda.broken.add("cudaEventSynchronize")
    with pytest.raises(Exception, match="cudaErrorInsufficientDriver"):
        ends[0]()
    cuda.broken.clear()
    check_outputs(ends[1](), 1, 5)
    check_outputs(runtime.run(batch(2, 5)), 2, 5)


class Leaking:
    """A runtime that gives an overlapping batch the outputs of the batch before it."""

    name, device, largest_batch = "leaking", "cuda:0", 8

    def __init__(self, runtime: TensorRTRuntime) -> None:
        self._runtime = runtime
        self._at_work: list[dict[str, np.ndarray]] = []

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._runtime.run(images)

    def begin(self, images: list[np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
        found = self._at_work[0] if self._at_work else self.run(np.stack(images))
        self._at_work.append(found)
        return self._at_work.pop


def test_a_runtime_that_mixes_up_batches_is_rejected(runtime: TensorRTRuntime, bundle: Bundle) -> None:
    probes = read_probes(bundle.probes)
    replay_overlapping(probes, runtime, 8)
    with pytest.raises(ParityError, match="deviates by"):
        replay_overlapping(probes, Leaking(runtime), 8)
