"""What these tests need: a CUDA device, and TensorRT."""

import pytest


@pytest.fixture(scope="session")
def cuda_device() -> None:
    """Skip the test on a machine without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def tensorrt() -> None:
    """Skip the test without TensorRT."""
    pytest.importorskip("tensorrt")
