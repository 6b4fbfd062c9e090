"""All tests of operators run on one thread."""

from collections.abc import Iterator

import pytest

from tests.support import quick_torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    with quick_torch.one_thread():
        yield
