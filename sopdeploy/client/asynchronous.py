"""The client to await, on asyncio."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import httpx

from sopdeploy.client import requests
from sopdeploy.client.connection import Connection, request_options
from sopdeploy.client.images import Picture
from sopdeploy.client.results import Classification, ServerInfo
from sopdeploy.client.retry import Compute, Pause, Send, Step, Talk

Value = TypeVar("Value")


class AsyncClient:
    """`Client` for asyncio: the same options, methods, results and errors, awaited.

    *connections* is how many may be open at once. Cancelling a call closes its connection, and the server
    drops the image.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            found = await asyncio.gather(*(client.classify(path) for path in paths))
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        connections: int = 100,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = Connection(url, api_key, timeout, retries)
        self._http = httpx.AsyncClient(
            base_url=self._connection.url,
            headers=self._connection.headers,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            transport=transport,
        )

    @overload
    async def classify(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        top_k: int | None = ...,
        model: str | None = ...,
        gates: bool = ...,
        timeout: float | None = ...,
    ) -> list[Classification]: ...
    @overload
    async def classify(
        self,
        image: Picture,
        *,
        top_k: int | None = ...,
        model: str | None = ...,
        gates: bool = ...,
        timeout: float | None = ...,
    ) -> Classification: ...
    async def classify(
        self,
        image: Picture | Sequence[Picture],
        *,
        top_k: int | None = None,
        model: str | None = None,
        gates: bool = False,
        timeout: float | None = None,
    ) -> Classification | list[Classification]:
        """Return the classes of *image*, as `Client.classify` does; files and arrays are read in a thread.

        Example:
            found = await client.classify("photo.jpg", timeout=2.0)
        """
        return await self._do(
            requests.classify(image, top_k, model, gates, self._connection.patience(timeout))
        )

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return which networks answer.

        Example:
            print((await client.info()).models)
        """
        return await self._do(requests.info(self._connection.patience(timeout)))

    async def metrics(self, *, timeout: float | None = None) -> str:
        """Return the server's numbers in Prometheus' text form.

        Example:
            print(await client.metrics())
        """
        return await self._do(requests.metrics(self._connection.patience(timeout)))

    async def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Return when the server is ready; raises `UnreachableError` where it is not within *timeout*.

        Example:
            await client.wait_ready(timeout=10)
        """
        await self._do(requests.wait_ready(self._connection.patience(timeout)))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _do(self, talk: Talk[Value]) -> Value:
        outcome: Any = None
        try:
            while True:
                outcome = await self._step(talk.send(outcome))
        except StopIteration as end:
            value: Value = end.value
            return value

    async def _step(self, step: Step) -> Any:
        match step:
            case Send():
                try:
                    async with asyncio.timeout(step.seconds):
                        return await self._http.request(**request_options(step))
                except (httpx.RequestError, TimeoutError) as problem:
                    return problem
            case Pause():
                return await asyncio.sleep(step.seconds)
            case Compute():
                return await asyncio.to_thread(step.function)
