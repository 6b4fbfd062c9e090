"""The asyncio client."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

import httpx

from sopdeploy.client import requests
from sopdeploy.client.requests import ClassifyOptions, ImageLike
from sopdeploy.client.results import Classification, ServerInfo, parse_server_info
from sopdeploy.client.retry import Flow, RunInThread, Send, Sleep

Value = TypeVar("Value")


class AsyncClient:
    """Asyncio version of `Client`, with the same options, methods, results and errors.

    *connections* limits the open connections. Cancelling a call closes its connection, and the server drops
    the request.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            results = await asyncio.gather(*(client.classify(path) for path in paths))
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
        self._options = requests.ClientOptions(url, api_key, timeout, retries)
        self._http = httpx.AsyncClient(
            base_url=self._options.url,
            headers=self._options.headers,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            transport=transport,
        )

    @overload
    async def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyOptions]
    ) -> list[Classification]: ...
    @overload
    async def classify(self, image: ImageLike, **options: Unpack[ClassifyOptions]) -> Classification: ...
    async def classify(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[ClassifyOptions]
    ) -> Classification | list[Classification]:
        """Classify *image* like `Client.classify`; files are read and arrays encoded in a thread.

        Example:
            result = await client.classify("photo.jpg", timeout=2.0)
        """
        return await self._run(requests.classify(image, self._options, **options))

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print((await client.info()).models)
        """
        return parse_server_info(await self._run(requests.get("/info", self._options.budget(timeout))))

    async def metrics(self, *, timeout: float | None = None) -> str:
        """Request the metrics in the Prometheus text format.

        Example:
            print(await client.metrics())
        """
        return (await self._run(requests.get("/metrics", self._options.budget(timeout)))).text

    async def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Wait until the server is ready; raise `UnreachableError` after *timeout* seconds.

        Example:
            await client.wait_ready(timeout=10)
        """
        await self._run(requests.wait_ready(self._options.budget(timeout)))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self, flow: Flow[Value]) -> Value:
        result: Any = None
        while True:
            try:
                action = flow.send(result)
            except StopIteration as end:
                value: Value = end.value
                return value
            match action:
                case Send():
                    try:
                        async with asyncio.timeout(action.seconds):
                            result = await self._http.request(**requests.httpx_arguments(action))
                    except (httpx.RequestError, TimeoutError) as error:
                        result = error
                case Sleep():
                    await asyncio.sleep(action.seconds)
                    result = None
                case RunInThread():
                    result = await asyncio.to_thread(action.function)
