"""The interface of a runtime, which runs batches of images, and its errors."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


def padded_sizes(largest: int) -> tuple[int, ...]:
    """List the batch sizes 1, 2, 4 and so on below *largest*, and *largest*."""
    return (*(1 << power for power in range((largest - 1).bit_length())), largest)


class OutOfMemoryError(Exception):
    """The device has no memory for a batch of this size now; a smaller one may fit."""


class DeviceLostError(Exception):
    """The device cannot run anything more in this process."""


class Runtime(Protocol):
    """One loaded network on one device; called by one thread at a time."""

    name: str  # with its version
    device: str  # `cpu`, `cuda:0`
    largest_batch: int

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name.

        The outputs must not share memory with *images*. Raises `DeviceLostError` if no other batch can run,
        `OutOfMemoryError` if a smaller one may, and any other exception if this batch has no outputs.
        """
        ...

    def close(self) -> None:
        """Release the memory of the network; no batch may be in flight. Later calls do nothing."""
        ...


@runtime_checkable
class OverlappingRuntime(Runtime, Protocol):
    """A runtime that accepts a batch while another one runs."""

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); return a function that waits for it.

        At most two batches may be in flight; they end in the order they began. *images* may be overwritten
        after this returns. Raises as `run` does, here or in the returned function.
        """
        ...


@runtime_checkable
class SelectiveRuntime(Runtime, Protocol):
    """A runtime that can omit outputs, unlike TensorRT, which computes and copies all of them."""

    def run_outputs(self, images: NDArray[np.uint8], names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8 as `run` does; return only the outputs *names*."""
        ...


class CudaError(NamedTuple):
    """A CUDA error: its code, API names, and the text that libraries print."""

    code: int
    runtime: str
    driver: str
    text: str


STICKY_ERRORS = (
    CudaError(46, "cudaErrorDevicesUnavailable", "CUDA_ERROR_DEVICE_UNAVAILABLE", "busy or unavailable"),
    CudaError(100, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    CudaError(214, "cudaErrorECCUncorrectable", "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error"),
    CudaError(
        220, "cudaErrorNvlinkUncorrectable", "CUDA_ERROR_NVLINK_UNCORRECTABLE", "uncorrectable NVLink error"
    ),
    CudaError(226, "cudaErrorContained", "CUDA_ERROR_CONTAINED", "access of peer GPU memory over nvlink"),
    CudaError(700, "cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS", "illegal memory access"),
    CudaError(702, "cudaErrorLaunchTimeout", "CUDA_ERROR_LAUNCH_TIMEOUT", "launch timed out"),
    CudaError(709, "cudaErrorContextIsDestroyed", "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"),
    CudaError(710, "cudaErrorAssert", "CUDA_ERROR_ASSERT", "device-side assert triggered"),
    CudaError(714, "cudaErrorHardwareStackError", "CUDA_ERROR_HARDWARE_STACK_ERROR", "hardware stack error"),
    CudaError(715, "cudaErrorIllegalInstruction", "CUDA_ERROR_ILLEGAL_INSTRUCTION", "illegal instruction"),
    CudaError(716, "cudaErrorMisalignedAddress", "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"),
    CudaError(
        717, "cudaErrorInvalidAddressSpace", "CUDA_ERROR_INVALID_ADDRESS_SPACE", "shared address space"
    ),
    CudaError(718, "cudaErrorInvalidPc", "CUDA_ERROR_INVALID_PC", "invalid program counter"),
    CudaError(719, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"),
    CudaError(
        721,
        "cudaErrorTensorMemoryLeak",
        "CUDA_ERROR_TENSOR_MEMORY_LEAK",
        "tensor memory not completely freed",
    ),
    CudaError(
        810,
        "cudaErrorMpsClientTerminated",
        "CUDA_ERROR_MPS_CLIENT_TERMINATED",
        "the MPS client has been terminated by the server",
    ),
    CudaError(
        811, "cudaErrorCdpNotSupported", "CUDA_ERROR_CDP_NOT_SUPPORTED", "is using CUDA Dynamic Parallelism"
    ),
    CudaError(
        911, "cudaErrorExternalDevice", "CUDA_ERROR_EXTERNAL_DEVICE", "external entity outside of CUDA"
    ),
    CudaError(
        999, "cudaErrorUnknown", "CUDA_ERROR_UNKNOWN", ""
    ),  # its text, `unknown error`, is not specific
)
MEMORY_ERROR = CudaError(2, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
ERROR_CODE = re.compile(r"\bCUDA (?:failure|error) (\d+)", re.IGNORECASE)
LIBRARY_MEMORY_ERRORS = (
    "outofmemory",  # TensorRT's own code
    "failed to allocate memory",  # onnxruntime's arena
    "smaller than requested bytes",
    "_alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_
    "bad_alloc",
)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate library errors to `DeviceLostError` or `OutOfMemoryError`."""
    try:
        yield
    except Exception as error:
        known = classify_error(str(error))
        if known is None:
            raise
        raise known from error


def classify_error(message: str) -> DeviceLostError | OutOfMemoryError | None:
    """Convert an error *message* to `DeviceLostError` or `OutOfMemoryError`; None for other errors."""
    match, lower = ERROR_CODE.search(message), message.lower()
    code = int(match[1]) if match else None
    for error in (*STICKY_ERRORS, MEMORY_ERROR):
        names = tuple(filter(None, (error.runtime.lower(), error.driver.lower(), error.text.lower())))
        if code is None:
            matches = any(re.search(rf"\b{re.escape(name)}\b", lower) for name in names)
        else:
            matches = code == error.code
        if matches:
            kind = OutOfMemoryError if error is MEMORY_ERROR else DeviceLostError
            return kind(f"CUDA {error.code}, {error.runtime}: {error.text}")
    positions = [lower.find(text) for text in LIBRARY_MEMORY_ERRORS if text in lower]
    if positions:
        start = min(positions) if "/onnxruntime_src/" in message else 0  # after C++ signatures
        return OutOfMemoryError(" ".join(message[start:].split())[:200])
    return None
