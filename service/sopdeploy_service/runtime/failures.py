"""What a GPU's libraries say when they fail, as the two errors that the server treats apart.

CUDA's codes are on NVIDIA's page of the runtime API's `cudaError`; onnxruntime and TensorRT quote them in
three ways: the name (`cudaErrorIllegalAddress`), the number (`CUDA failure 700: ...`) or the words alone. A
device is lost where NVIDIA says that the process must end; memory may be there for less.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sopdeploy_service.runtime.base import DeviceLostError, OutOfMemoryError


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
