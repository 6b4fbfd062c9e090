"""GPU errors of every library become the errors that the server handles."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.tensorrt.cuda import Cuda, CudaResources
from sopdeploy_service.runtime.base import (
    MEMORY_ERROR,
    STICKY_ERRORS,
    DeviceLostError,
    OutOfMemoryError,
    classify_error,
)
from sopdeploy_service.runtime.onnxruntime import CPU, OnnxRuntime
from tests.tensorrt.networks import some_images

ORT = "Non-zero status code returned while running Conv node. Name:'node_3' Status Message: "


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{ORT}CUDA failure 2: out of memory ; GPU=0 ; hostname=host ; expr=cudaMalloc(", OutOfMemoryError),
        (f"{ORT}Failed to allocate memory for requested buffer of size 1073741824", OutOfMemoryError),
        (f"{ORT}Available memory of 512 is smaller than requested bytes of 1024", OutOfMemoryError),
        (f"{ORT}CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", OutOfMemoryError),
        ("CUDA: cudaMalloc failed with cudaErrorMemoryAllocation", OutOfMemoryError),
        ("executeV3: Error Code 2: OutOfMemory (Requested size was 9 bytes.)", OutOfMemoryError),
        ("std::bad_alloc", OutOfMemoryError),
        (f"{ORT}CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceLostError),
        ("Error Code 1: Cuda Runtime (an illegal memory access was encountered)", DeviceLostError),
        ("CUDA error 710: device-side assert triggered", DeviceLostError),
        ("CUDA: cudaStreamSynchronize failed with cudaErrorLaunchFailure", DeviceLostError),
        ("Cuda Runtime (unspecified launch failure)", DeviceLostError),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", DeviceLostError),
        ("CUDA failure 719: out of memory, says a driver that is gone", DeviceLostError),
        ("CUDA failure 1: invalid argument", None),
        ("CUDA failure 7000: no such code", None),
        ("Got invalid dimensions for input: images", None),
        ("TensorRT cannot run the batch: Error Code 3: API Usage Error", None),
    ],
)
def test_error_messages_of_every_library_are_classified(text: str, kind: type[Exception] | None) -> None:
    found = classify_error(text)
    assert (None if found is None else type(found)) is kind
    assert "\n" not in str(found)


@pytest.mark.parametrize("one", STICKY_ERRORS, ids=lambda one: str(one.code))
def test_a_sticky_error_is_a_lost_device_in_every_wording(one: Any) -> None:
    texts = [f"an {one.text} was met"] if one.text else []
    for wording in (one.runtime, one.driver, f"CUDA failure {one.code}: x", *texts):
        found = classify_error(wording)
        assert isinstance(found, DeviceLostError)
        assert str(found).startswith(f"CUDA {one.code}, ")


def test_names_and_texts_are_those_of_the_cuda_library() -> None:
    """`cuda-bindings` has them, also without a driver."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    driver = pytest.importorskip("cuda.bindings.driver")
    for error in (*STICKY_ERRORS, MEMORY_ERROR):
        status = runtime.cudaError_t(error.code)
        assert (status.name, driver.CUresult(error.code).name) == (error.runtime, error.driver)
        text = runtime.cudaGetErrorString(status)[1].decode()
        assert error.text in text
        assert isinstance(classify_error(f"CUDA failure {error.code}: {text}"), Exception)


def test_the_cuda_library_accepts_every_call() -> None:
    """Without a driver, `cuda-bindings` checks the arguments and returns the same error for all calls."""
    library = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if library.cudaGetDeviceCount()[0] != library.cudaError_t.cudaErrorInsufficientDriver:
        pytest.skip("this machine has an NVIDIA driver")
    cuda = Cuda(library)
    resources, stream, pixels = CudaResources(cuda), library.cudaStream_t(0), np.zeros(4, np.uint8)
    event, graph = library.cudaEvent_t(0), library.cudaGraphExec_t(0)
    calls: dict[str, Callable[[], Any]] = {
        "cudaStreamCreateWithFlags": resources.stream,
        "cudaEventCreateWithFlags": resources.event,
        "cudaMalloc": lambda: resources.device_memory(16),
        "cudaHostAlloc": lambda: resources.pinned_array((2, 2), np.uint8),
        "cudaMemGetInfo": cuda.free_memory,
        "cudaGetDeviceProperties": cuda.gpu,
        "cudaStreamBeginCapture": lambda: resources.capture(lambda: None, stream),
        "cudaMemcpyAsync": lambda: cuda.copy(pixels, 256, stream, upload=True),
        "cudaStreamSynchronize": lambda: cuda.synchronize(stream),
        "cudaStreamWaitEvent": lambda: cuda.call("cudaStreamWaitEvent", stream, event, 0),
        "cudaEventRecord": lambda: cuda.call("cudaEventRecord", event, stream),
        "cudaEventSynchronize": lambda: cuda.call("cudaEventSynchronize", event),
        "cudaGraphLaunch": lambda: cuda.call("cudaGraphLaunch", graph, stream),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeUnavailableError, match=f"{name} failed with cudaErrorInsufficientDriver"):
            call()


def test_onnxruntime_errors_are_translated_with_their_cause(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnnxRuntime(bundle, provider=CPU)

    def run(*_: Any) -> Any:
        raise RuntimeError(f"{ORT}CUDA failure 700: an illegal memory access was encountered")

    monkeypatch.setattr(runtime, "_session", SimpleNamespace(run=run))
    with pytest.raises(DeviceLostError, match=r"^CUDA 700, cudaErrorIllegalAddress") as caught:
        runtime.run(some_images(1))
    assert isinstance(caught.value.__cause__, RuntimeError)
