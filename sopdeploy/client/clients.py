"""The blocking and the asyncio client: both run `Calls` and differ only in how they send and sleep."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar, Unpack, overload

import httpx

from sopdeploy.client.requests import (
    CallArguments,
    Calls,
    ClassifyArguments,
    ImageLike,
    address_and_key,
    encode_images,
)
from sopdeploy.client.results import Classification, Embedding
from sopdeploy.http_api import ServerInfo

_Value = TypeVar("_Value")


class Client:
    """Blocking client of the server at *url*. Thread-safe; connections stay open until `close`.

    *timeout* is the total time of a call in seconds, including retries. *retries* is how often a request is
    repeated after 429, 503 or a connection that broke before a response.

        with Client("http://127.0.0.1:8000") as client:
            print(client.classify("photo.jpg").classes[0].label)
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**address_and_key(url, api_key), transport=transport)
        self._calls = Calls(self._http, self._send, self._sleep, timeout, retries)

    @overload
    def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyArguments]
    ) -> list[Classification]: ...
    @overload
    def classify(self, image: ImageLike, **options: Unpack[ClassifyArguments]) -> Classification: ...
    def classify(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[ClassifyArguments]
    ) -> Classification | list[Classification]:
        """Classify *image*: a path, bytes, a PIL image, a uint8 array (H, W, 3) or (H, W), or a list of them.

        A list is sent as one request; an image of the list that cannot be classified has `error` set. *top_k*
        is the number of classes, *model* the model to use if the server has several. *gates* requests the
        components that a gated network selects. *threshold* replaces the thresholds of a multi-label network.
        *timeout* replaces that of the client. Raises `ServiceError` if the server rejects the request,
        `OverloadedError` if it is overloaded, `UnreachableError` without a response in time, and `DataError`
        or `ConfigError` for an image that cannot be sent.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for result in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(result.error.detail if result.error else result.classes[0].label)
        """
        return _run(self._calls.classify(encode_images(image), **options))

    @overload
    def embed(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallArguments]
    ) -> list[Embedding]: ...
    @overload
    def embed(self, image: ImageLike, **options: Unpack[CallArguments]) -> Embedding: ...
    def embed(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[CallArguments]
    ) -> Embedding | list[Embedding]:
        """Compute the features of *image*, or of a list of images, in front of the classifier.

        Arguments and errors are those of `classify`. The bundle must have been exported with
        `--with-features`.

        Example:
            first, second = (result.values for result in client.embed(["a.jpg", "b.jpg"]))
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        """
        return _run(self._calls.embed(encode_images(image), **options))

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print([model.name for model in client.info().models])
        """
        return _run(self._calls.info(timeout))

    def metrics(self, *, timeout: float | None = None) -> str:
        """Request the metrics in the Prometheus text format.

        Example:
            print(client.metrics())
        """
        return _run(self._calls.metrics(timeout))

    def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Wait until the server is ready; raise `UnreachableError` after *timeout* seconds.

        Example:
            client.wait_ready(timeout=10)
        """
        _run(self._calls.wait_ready(timeout))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        return self._http.send(request)

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class AsyncClient:
    """Asyncio version of `Client`, with the same options, methods, results and errors.

    *max_connections* limits the connections. Cancelling a call closes its connection, and the server drops
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
        max_connections: int = 100,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        self._http = httpx.AsyncClient(**address_and_key(url, api_key), limits=limits, transport=transport)
        self._calls = Calls(self._http, self._send, asyncio.sleep, timeout, retries)

    @overload
    async def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyArguments]
    ) -> list[Classification]: ...
    @overload
    async def classify(self, image: ImageLike, **options: Unpack[ClassifyArguments]) -> Classification: ...
    async def classify(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[ClassifyArguments]
    ) -> Classification | list[Classification]:
        """Classify *image* like `Client.classify`; files are read and arrays encoded in a thread."""
        body = image if isinstance(image, bytes) else await asyncio.to_thread(encode_images, image)
        return await self._calls.classify(body, **options)

    @overload
    async def embed(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallArguments]
    ) -> list[Embedding]: ...
    @overload
    async def embed(self, image: ImageLike, **options: Unpack[CallArguments]) -> Embedding: ...
    async def embed(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[CallArguments]
    ) -> Embedding | list[Embedding]:
        """Compute the features of *image* like `Client.embed`."""
        body = image if isinstance(image, bytes) else await asyncio.to_thread(encode_images, image)
        return await self._calls.embed(body, **options)

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Like `Client.info`."""
        return await self._calls.info(timeout)

    async def metrics(self, *, timeout: float | None = None) -> str:
        """Like `Client.metrics`."""
        return await self._calls.metrics(timeout)

    async def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Like `Client.wait_ready`."""
        await self._calls.wait_ready(timeout)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        async with asyncio.timeout(request.extensions["timeout"]["read"]):  # of all phases together
            return await self._http.send(request)


def _run(call: Coroutine[Any, Any, _Value]) -> _Value:
    """Run *call* of a blocking client to its end; it never suspends, so that no event loop is needed."""
    try:
        call.send(None)
    except StopIteration as end:
        value: _Value = end.value
        return value
    raise RuntimeError("a call of the blocking client was suspended")
