"""A scripted server for responses that a real one does not give on demand."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from sopdeploy.client import AsyncClient, Client, requests


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
    """The delays of all retries; no client actually sleeps."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("sopdeploy.client.clients.time.sleep", found.append)
    monkeypatch.setattr("sopdeploy.client.clients.asyncio.sleep", sleep)
    monkeypatch.setattr(requests.random, "uniform", lambda low, high: high)
    return found


def blocking(script: Script, method: str, *arguments: Any, **options: Any) -> Any:
    settings = {key: options.pop(key) for key in ("retries", "api_key") if key in options}
    with Client("http://server", transport=httpx.MockTransport(script), **settings) as client:
        return getattr(client, method)(*arguments, **options)


def awaited(script: Script, method: str, *arguments: Any, **options: Any) -> Any:
    settings = {key: options.pop(key) for key in ("retries", "api_key") if key in options}

    async def run() -> Any:
        transport = httpx.MockTransport(script)
        async with AsyncClient("http://server", transport=transport, **settings) as client:
            return await getattr(client, method)(*arguments, **options)

    return asyncio.run(run())


@pytest.fixture(params=[blocking, awaited], ids=["Client", "AsyncClient"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`call(script, method, ...)` on each kind of client: both must behave the same."""
    found: Callable[..., Any] = request.param
    return found
