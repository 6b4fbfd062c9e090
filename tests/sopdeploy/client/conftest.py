"""A server made of a list of replies, for what a real one does not do on demand."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from sopdeploy.client import AsyncClient, Client
from sopdeploy.client import retry as talk

ANSWER = {"classes": [{"label": "cat", "probability": 0.75}]}


class Script:
    """Gives its replies one by one, the last for ever; an exception among them is raised."""

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


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"title": "x", "status": status, "code": code, "detail": "because"}
    return httpx.Response(status, json=body, headers=headers)


@pytest.fixture
def refusal() -> Callable[..., httpx.Response]:
    return problem


@pytest.fixture
def answer() -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every pause of either client, none of which is slept."""
    found: list[float] = []

    async def at_once(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("sopdeploy.client.synchronous.time.sleep", found.append)
    monkeypatch.setattr("sopdeploy.client.asynchronous.asyncio.sleep", at_once)
    monkeypatch.setattr(talk.random, "uniform", lambda low, high: high)
    return found


def blocking(replies: Script, method: str, *given: Any, **options: Any) -> Any:
    settings = {key: options.pop(key) for key in ("retries", "api_key") if key in options}
    with Client("http://server", transport=httpx.MockTransport(replies), **settings) as client:
        return getattr(client, method)(*given, **options)


def awaiting(replies: Script, method: str, *given: Any, **options: Any) -> Any:
    settings = {key: options.pop(key) for key in ("retries", "api_key") if key in options}

    async def run() -> Any:
        transport = httpx.MockTransport(replies)
        async with AsyncClient("http://server", transport=transport, **settings) as client:
            return await getattr(client, method)(*given, **options)

    return asyncio.run(run())


@pytest.fixture(params=[blocking, awaiting], ids=["Client", "AsyncClient"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`call(script, method, ...)` on a client of one kind or the other: both must do the same."""
    found: Callable[..., Any] = request.param
    return found
