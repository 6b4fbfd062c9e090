"""GPU errors of every library become the errors that the server handles."""

from typing import Any

import pytest

from sopdeploy_service.inference.model_worker import run_bisected
from sopdeploy_service.runtime.base import (
    LOST_DEVICE,
    OTHER_GPU,
    DeviceLostError,
    OutOfMemoryError,
    classify_error,
    reason_of,
)
from tests.tensorrt.networks import some_images

ORT = "Non-zero status code returned while running Conv node. Name:'node_3' Status Message: "


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{ORT}CUDA failure 2: out of memory ; GPU=0 ; hostname=host ; expr=cudaMalloc(", OutOfMemoryError),
        (f"{ORT}Failed to allocate memory for requested buffer of size 1073741824", OutOfMemoryError),
        ("CUDA: cudaMalloc failed with cudaErrorMemoryAllocation", OutOfMemoryError),
        ("executeV3: Error Code 2: OutOfMemory (Requested size was 9 bytes.)", OutOfMemoryError),
        ("std::bad_alloc", OutOfMemoryError),
        (f"{ORT}CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceLostError),
        ("Error Code 1: Cuda Runtime (an illegal memory access was encountered)", DeviceLostError),
        ("CUDA error 710: device-side assert triggered", DeviceLostError),
        ("CUDA: cudaStreamSynchronize failed with cudaErrorLaunchFailure", DeviceLostError),
        ("CUDA failure 719: out of memory, says a driver that is gone", DeviceLostError),
        ("CUDA failure 1: invalid argument", None),
        ("TensorRT cannot run the batch: Error Code 3: API Usage Error", None),
    ],
)
def test_error_messages_of_every_library_are_classified(text: str, kind: type[Exception] | None) -> None:
    found = classify_error(RuntimeError(text))
    assert (None if found is None else type(found)) is kind
    assert "\n" not in str(found)


def test_every_wording_of_the_cuda_library_is_a_lost_device() -> None:
    """`cuda-bindings` has names and texts, also without a driver."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    driver = pytest.importorskip("cuda.bindings.driver")
    for code in LOST_DEVICE:
        status = runtime.cudaError_t(code)
        text = runtime.cudaGetErrorString(status)[1].decode()
        for wording in (status.name, driver.CUresult(code).name, f"CUDA failure {code}: x", text):
            found = classify_error(RuntimeError(wording))
            assert wording == "unknown error" or str(found).startswith(f"CUDA {code}, {status.name}")


def test_a_worker_ends_on_a_lost_device_with_its_cause() -> None:
    def run(_: Any) -> Any:
        raise RuntimeError(f"{ORT}CUDA failure 700: an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match=r"^CUDA 700, cudaErrorIllegalAddress") as caught:
        run_bisected(run, list(some_images(2)), ["logits"])
    assert isinstance(caught.value.__cause__, RuntimeError)


KERNELS = "no kernel image is available for execution on the device"
OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"cuda_call.cc:154 [THRW = true]\nCUDA failure 35: {OLD_DRIVER} ; GPU=-1 ;",
            f"failure 35: {OLD_DRIVER}",
        ),
        (f"{ORT}CUDA failure 209: {KERNELS} ; GPU=0", f"failure 209: {KERNELS}; {OTHER_GPU}"),
    ],
)
def test_a_failure_of_cuda_is_shown_without_the_library_s_source(text: str, reason: str) -> None:
    assert reason_of(RuntimeError(text)) == f"CUDA {reason}"
