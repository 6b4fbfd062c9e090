"""The replaceable part: whatever turns a batch of images into the network's outputs."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class OutOfMemoryError(Exception):
    """The device has no memory for a batch of this size now; a smaller one may do."""


class DeviceLostError(Exception):
    """The device will answer nothing more in this process (a CUDA error that sticks, say)."""


class Runtime(Protocol):
    """One loaded network on one device; called by one thread at a time."""

    name: str  # with its version
    device: str  # `cpu`, `cuda:0`
    largest_batch: int

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8.

        n is 1 to `largest_batch`. Nothing that is returned or kept may lie in the memory of *images*: the
        next batch will fill it. Any exception means that this batch got no result; `DeviceLostError` that
        no other will, `OutOfMemoryError` that a smaller one may.
        """
        ...


@runtime_checkable
class Overlapping(Runtime, Protocol):
    """A runtime that is given the next batch while one is at work, so that no device waits for Python."""

    def begin(self, images: Sequence[NDArray[np.uint8]]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); what is returned waits for it and gives what `run` would.

        At most two may be under way; they end in the order they were begun. The images may change as soon as
        this returns. Raises as `run` does, here or where it is waited for.
        """
        ...


class Failure(NamedTuple):
    """One of CUDA's errors: its code, the names it has in runtime and driver, what libraries print of it."""

    code: int
    runtime: str
    driver: str
    words: str


LOST = (
    Failure(214, "cudaErrorECCUncorrectable", "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error"),
    Failure(
        220, "cudaErrorNvlinkUncorrectable", "CUDA_ERROR_NVLINK_UNCORRECTABLE", "uncorrectable NVLink error"
    ),
    Failure(700, "cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS", "illegal memory access"),
    Failure(702, "cudaErrorLaunchTimeout", "CUDA_ERROR_LAUNCH_TIMEOUT", "launch timed out"),
    Failure(709, "cudaErrorContextIsDestroyed", "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"),
    Failure(710, "cudaErrorAssert", "CUDA_ERROR_ASSERT", "device-side assert triggered"),
    Failure(714, "cudaErrorHardwareStackError", "CUDA_ERROR_HARDWARE_STACK_ERROR", "hardware stack error"),
    Failure(715, "cudaErrorIllegalInstruction", "CUDA_ERROR_ILLEGAL_INSTRUCTION", "illegal instruction"),
    Failure(716, "cudaErrorMisalignedAddress", "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"),
    Failure(717, "cudaErrorInvalidAddressSpace", "CUDA_ERROR_INVALID_ADDRESS_SPACE", "shared address space"),
    Failure(718, "cudaErrorInvalidPc", "CUDA_ERROR_INVALID_PC", "invalid program counter"),
    Failure(719, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"),
)
MEMORY = Failure(2, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
NUMBER = re.compile(r"\bCUDA (?:failure|error) (\d+)", re.IGNORECASE)
MEMORY_OF_LIBRARIES = (
    "outofmemory",  # TensorRT's own code
    "failed to allocate memory",  # onnxruntime's arena
    "smaller than requested bytes",
    "_alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_
    "bad_alloc",
)


@contextmanager
def translated() -> Iterator[None]:
    """Turn an exception from inside into `DeviceLostError` or `OutOfMemoryError` where it is one."""
    try:
        yield
    except Exception as problem:
        known = failure(str(problem))
        if known is None:
            raise
        raise known from problem


def failure(text: str) -> DeviceLostError | OutOfMemoryError | None:
    """Return the error that *text*, a library's message, speaks of; None where it is another one."""
    number = NUMBER.search(text)
    code, small = int(number[1]) if number else None, text.lower()
    for one in LOST:
        if said(one, code, small):
            return DeviceLostError(f"CUDA {one.code}, {one.runtime}: {one.words}")
    if said(MEMORY, code, small):
        return OutOfMemoryError(f"CUDA {MEMORY.code}, {MEMORY.runtime}: {MEMORY.words}")
    words = next((words for words in MEMORY_OF_LIBRARIES if words in small), None)
    return None if words is None else OutOfMemoryError(" ".join(text.split())[:200])


def said(one: Failure, code: int | None, small: str) -> bool:
    """Say whether a message with *code*, or none, in lower case *small*, speaks of *one*."""
    if code is not None:
        return code == one.code
    names = (one.runtime.lower(), one.driver.lower(), one.words.lower())
    return any(re.search(rf"\b{re.escape(name)}\b", small) for name in names)
