"""One thread: the machines that run the tests share their cores, and small networks gain nothing."""

from collections.abc import Iterator

import pytest
import torch

from tests.sopdeploy.training import runs
from tests.support import quick_torch
from tests.support.clients import CLIENTS


@pytest.fixture(scope="session", autouse=True)
def _quick_torch() -> None:
    quick_torch.keep()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_digits() -> Iterator[None]:
    with runs.few_digits():
        yield


@pytest.fixture(params=CLIENTS, ids=lambda kind: kind.__name__)
def client_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with both clients: replace `Client` in its module."""
    monkeypatch.setattr(request.module, "Client", request.param)
