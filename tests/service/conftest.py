"""The fixtures of the service's tests."""

import time
from types import SimpleNamespace

import pytest

from sopdeploy_service.observability import pages
from tests.support.service import (  # noqa: F401
    bundle,
    bundle_path,
    carded_bundle,
    carded_client,
    client,
    jpeg,
    onnx_runtime,
    pool,
    serve_with,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of `time.monotonic`, which stands until a test moves it."""
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.time)
    return now


@pytest.fixture(autouse=True, scope="session")
def fresh_pages() -> None:
    """Let servers of this process make a new page of metrics for each request."""
    pages.SHARED_SECONDS = 0.0
