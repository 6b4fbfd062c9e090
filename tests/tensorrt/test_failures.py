"""Messages of GPU libraries: which say that memory is missing, and what a user reads of them."""

import pytest

from sopdeploy_service.runtime.base import OTHER_GPU, is_out_of_memory, readable_reason

ORT = "Non-zero status code returned while running Conv node. Name:'node_3' Status Message: "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"{ORT}CUDA failure 2: out of memory ; GPU=0 ; hostname=host ; expr=cudaMalloc(",
            True,
        ),
        (f"{ORT}Failed to allocate memory for requested buffer of size 1073741824", True),
        ("CUDA: cudaMalloc failed with cudaErrorMemoryAllocation", True),
        ("executeV3: Error Code 2: OutOfMemory (Requested size was 9 bytes.)", True),
        ("std::bad_alloc", True),
        (f"{ORT}CUDA failure 700: an illegal memory access was encountered ; GPU=0", False),
        ("CUDA failure 1: invalid argument", False),
        ("TensorRT cannot run the batch: Error Code 3: API Usage Error", False),
    ],
)
def test_every_library_s_words_for_a_lack_of_memory_are_known(
    text: str, expected: bool
) -> None:
    assert is_out_of_memory(RuntimeError(text)) is expected


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
def test_a_failure_of_cuda_is_shown_without_the_library_s_source(
    text: str, reason: str
) -> None:
    assert readable_reason(RuntimeError(text)) == f"CUDA {reason}"
