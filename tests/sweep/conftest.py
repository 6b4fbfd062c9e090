"""One thread, as for every test of the export."""

from collections.abc import Iterator

import pytest
import torch

from tests import quick_torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    quick_torch.keep()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
