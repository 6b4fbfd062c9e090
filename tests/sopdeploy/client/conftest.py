"""A scripted server for responses that a real one does not give on demand."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from sopdeploy.client import Client, messages


class Script:
    """Transport handler that replays its replies and repeats the last; exceptions are raised."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def problem() -> Callable[..., httpx.Response]:
    def build(status: int, code: str, **headers: str) -> httpx.Response:
        body = {"title": "x", "status": status, "code": code, "detail": "because"}
        return httpx.Response(status, json=body, headers=headers)

    return build


@pytest.fixture
def success() -> httpx.Response:
    return httpx.Response(200, json={"classes": [{"label": "cat", "probability": 0.75}]})


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays of all retries; the client does not sleep."""
    found: list[float] = []

    monkeypatch.setattr("sopdeploy.client.client.time.sleep", found.append)
    monkeypatch.setattr(messages.random, "uniform", lambda low, high: high)
    return found


@pytest.fixture
def call() -> Callable[..., Any]:
    """`call(script, method, ...)` calls a method of a client."""

    def run(script: Script, method: str, *arguments: Any, **options: Any) -> Any:
        settings = {key: options.pop(key) for key in ("retries", "api_key") if key in options}
        with Client("http://server", transport=httpx.MockTransport(script), **settings) as client:
            return getattr(client, method)(*arguments, **options)

    return run
