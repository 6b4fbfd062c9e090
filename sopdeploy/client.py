"""Clients of `sopdeploy serve`, which import neither torch nor the server.

`AsyncClient` is for programs with asyncio, `Client` for all others. Both run the same
coroutines. Keys of newer servers are ignored in responses.
"""

import asyncio
import base64
import os
import re
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, Self, TypedDict, TypeVar, Unpack, cast, overload

import httpx
import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.client_requests import CLOSED, Requests, foreign_answer_error
from sopdeploy.config import StrictModel, parse_json
from sopdeploy.errors import ConfigError, DataError, ImageError, ServiceError
from sopdeploy.http_api import Classes, ClassProbability, Problem, ServerInfo
from sopdeploy.images.encode import AnyImage, encode_image, name_image, naming

Value = TypeVar("Value")
Result = TypeVar("Result", bound="ImageResult")

# The server detects the format; a wrong type causes a warning
CONTENT_TYPE = "application/octet-stream"
# linear, whatever a server sends
DURATION = re.compile(r"(?<![a-z])([a-z]+);dur=(\d+(?:\.\d+)?)")
TOO_LARGE = 413  # also of a proxy
TOO_MANY_IMAGES = "too_many_images"


class ImageResult(StrictModel):
    """What every result for one image has.

    Attributes:
        error: set if the server has no result for this image of a list.
        model_digest: id of the bundle that computed the result.
        timing_ms: server time per stage (receive, decode, queue, infer); for a list, of its slowest image.
    """

    error: Problem | None = None
    model_digest: str = ""
    timing_ms: dict[str, float] = pydantic.Field(default_factory=dict)


class Embedding(ImageResult):
    """The features of one image in front of the classifier.

    Attributes:
        values: (D,) float32, read-only; empty if `error` is set.
        warnings: codes of the changes made while decoding, such as first_frame_only.
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    values: NDArray[np.float32] = pydantic.Field(
        np.zeros(0, np.float32), validation_alias="embedding"
    )
    warnings: tuple[str, ...] = ()

    @pydantic.field_validator("values", mode="before")
    @classmethod
    def _decode(cls, text: str) -> NDArray[np.float32]:
        return np.frombuffer(base64.b64decode(text), "<f4")


class Classification(ImageResult, Classes):
    """The result for one image, with the attributes of `ImageResult` and `Classes`.

    Attributes:
        classes: most probable classes, best first; empty if `error` is set.
    """

    classes: tuple[ClassProbability, ...] = ()


class CallArguments(TypedDict, total=False):
    """The arguments of every call with images; `Client.classify` describes them."""

    model: str | None
    timeout: float | None


class ClassifyArguments(CallArguments, total=False):
    """The arguments of `Client.classify`."""

    top_k: int | None
    threshold: float | None
    explain: bool


class AsyncClient:
    """Client of the server at *url* for programs with asyncio, such as FastAPI services.

    It has the arguments, methods and errors of `Client`, but the methods are awaited. Any number
    of tasks of one event loop may share it; a call that is cancelled ends its request. A list or
    an array is encoded in a thread. *transport* replaces the connections, for example to trust
    certificates of its own: `httpx.AsyncHTTPTransport(verify=ssl_context)`.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            print((await client.classify("photo.jpg")).classes[0].label)
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._requests = Requests(url, api_key, timeout, retries, transport)

    @overload
    async def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyArguments]
    ) -> list[Classification]: ...
    @overload
    async def classify(
        self, image: AnyImage, **options: Unpack[ClassifyArguments]
    ) -> Classification: ...
    async def classify(
        self,
        image: AnyImage | Sequence[AnyImage],
        *,
        model: str | None = None,
        timeout: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        explain: bool = False,
    ) -> Classification | list[Classification]:
        """Do what `Client.classify` does, without blocking the event loop."""
        return await self._run(_classify, image, model, timeout, top_k, threshold, explain)

    @overload
    async def embed(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallArguments]
    ) -> list[Embedding]: ...
    @overload
    async def embed(self, image: AnyImage, **options: Unpack[CallArguments]) -> Embedding: ...
    async def embed(
        self,
        image: AnyImage | Sequence[AnyImage],
        *,
        model: str | None = None,
        timeout: float | None = None,
    ) -> Embedding | list[Embedding]:
        """Do what `Client.embed` does, without blocking the event loop."""
        return await self._run(_embed, image, model, timeout)

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models."""
        return await self._run(_get_info, timeout)

    async def close(self) -> None:
        """Close the connections; later calls are errors."""
        await self._requests.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(
        self, call: Callable[..., Coroutine[Any, Any, Value]], *arguments: Any
    ) -> Value:
        return await call(self._requests, *arguments)


class Client:
    """Blocking client of the server at *url*, for any number of threads and, after a fork, processes.

    Connections stay open until `close`. *timeout* is the total time of a call in seconds,
    including retries and the whole response. *retries* is how often a request is repeated after
    429, 503 or a connection that broke before a response. A server on another machine is
    requested through the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names, unless NO_PROXY
    excludes it. Raises `ConfigError` for a URL, key, timeout or proxy that cannot be used.

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
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
    ) -> None:
        own = _InThread(transport) if isinstance(transport, httpx.BaseTransport) else transport
        if isinstance(transport, httpx.AsyncBaseTransport):  # also of both kinds
            own = transport
        self._make = partial(Requests, url, api_key, timeout, retries, own)
        self._make()  # raises `ConfigError`

        self._loops: dict[int, _Loop] = {}  # by process
        self._has_transport = transport is not None
        self._is_closed = False

    @overload
    def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyArguments]
    ) -> list[Classification]: ...
    @overload
    def classify(
        self, image: AnyImage, **options: Unpack[ClassifyArguments]
    ) -> Classification: ...
    def classify(
        self,
        image: AnyImage | Sequence[AnyImage],
        *,
        model: str | None = None,
        timeout: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        explain: bool = False,
    ) -> Classification | list[Classification]:
        """Classify *image*: a path, bytes, a file, a PIL image, a uint8 array, or a list of them.

        A list is sent as one request, or as several if its images are together more than the
        server takes. If one of several images cannot be classified, its result has `error` set. *top_k*
        is the number of classes, *model* the model to use if the server has several.
        *threshold* replaces the thresholds of a multi-label network. *explain* requests the
        `explanation` of the first class; an image then counts as 50 for the server. *timeout*
        replaces the timeout of the client. Raises `ServiceError` if the server rejects the request or
        its only image, `OverloadedError` if it is overloaded, `UnreachableError` without a
        response in time, and `DataError` for what is no image.

        Arrays are (H, W, 3), (H, W, 4) or (H, W); a PIL image is turned by its EXIF tag, as its
        file is.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for result in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(result.error.detail if result.error else result.classes[0].label)
        """
        return self._run(_classify, image, model, timeout, top_k, threshold, explain)

    @overload
    def embed(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallArguments]
    ) -> list[Embedding]: ...
    @overload
    def embed(self, image: AnyImage, **options: Unpack[CallArguments]) -> Embedding: ...
    def embed(
        self,
        image: AnyImage | Sequence[AnyImage],
        *,
        model: str | None = None,
        timeout: float | None = None,
    ) -> Embedding | list[Embedding]:
        """Compute the features of *image*, or of a list of images, in front of the classifier.

        It takes the arguments of `classify`, and raises the same errors. The bundle must be exported with
        `--with-features`.

        Example:
            first, second = (result.values for result in client.embed(["a.jpg", "b.jpg"]))
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        """
        return self._run(_embed, image, model, timeout)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print([model.name for model in client.info().models])
        """
        return self._run(_get_info, timeout)

    def close(self) -> None:
        """Close the connections of this process; later calls are errors."""
        self._is_closed = True
        if (loop := self._loops.get(os.getpid())) is not None:
            loop.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle has: everything but the connections, which belong to this process."""
        return {**self.__dict__, "_loops": {}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Callable[..., Coroutine[Any, Any, Value]], *arguments: Any) -> Value:
        if self._is_closed:
            raise ConfigError(CLOSED)
        return self._loop().run(call, *arguments)

    def _loop(self) -> "_Loop":
        """Return the loop of this process; the one of the process that it was forked from stays unused.

        Two processes on one connection would read each other's responses, and a thread does not
        survive a fork.
        """
        process = os.getpid()
        if process in self._loops:
            return self._loops[process]
        if self._has_transport and self._loops:
            raise ConfigError(
                "a client with its own transport works in one process only; make another one in this process"
            )

        # Of several threads, the first one wins. The loop ends with the client.
        made = _Loop(self._make())
        loop = self._loops.setdefault(process, made)
        if loop is made:
            weakref.finalize(self, made.end)
        else:
            made.close()
        return loop


class _Loop:
    """An event loop in a thread, which sends *requests* for the threads that wait for them."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._has_ended = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._serve, name="sopdeploy client", daemon=True
        )
        self._thread.start()

    def run(self, call: Callable[..., Coroutine[Any, Any, Value]], *arguments: Any) -> Value:
        """Run *call* with the requests and *arguments*, and wait for its result."""
        with self._lock:
            if self._has_ended:
                raise ConfigError(CLOSED)
            task = asyncio.run_coroutine_threadsafe(
                call(self._requests, *arguments), self._loop
            )

        try:
            return task.result()
        except CancelledError:  # by `end`
            raise ConfigError(CLOSED) from None
        except KeyboardInterrupt:
            task.cancel()
            raise

    def end(self) -> None:
        """Cancel all calls and end the thread, without waiting for it."""
        if os.getpid() != self._process:  # at the end of a process made by fork
            return
        with self._lock:
            if not self._has_ended:
                self._has_ended = True
                self._loop.call_soon_threadsafe(self._start_end)

    def close(self) -> None:
        """End the thread and wait for it."""
        self.end()
        self._thread.join()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _start_end(self) -> None:
        self._last = self._loop.create_task(self._end())

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        await self._requests.close()
        # The bodies of responses that nobody read to their end
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


class _InThread(httpx.AsyncBaseTransport):
    """A blocking *transport* of a user, which sends each request in a thread."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await asyncio.to_thread(self._exchange, request)

    def _exchange(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        try:
            content = httpx.ByteStream(b"".join(cast(httpx.SyncByteStream, response.stream)))
        finally:
            response.close()
        return httpx.Response(response.status_code, headers=response.headers, stream=content)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._transport.close)


async def _get_info(requests: Requests, timeout: float | None) -> ServerInfo:
    response = await requests.send("GET", "/info", requests.limit(timeout))
    try:
        return ServerInfo.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError as error:
        raise foreign_answer_error(response) from error


async def _classify(
    requests: Requests,
    image: AnyImage | Sequence[AnyImage],
    model: str | None,
    timeout: float | None,
    top_k: int | None,
    threshold: float | None,
    explain: bool,
) -> Classification | list[Classification]:
    params = {
        "model": model,
        "top_k": top_k,
        "threshold": threshold,
        "explain": explain or None,
    }
    return await _post(requests, "/v1/classify", image, Classification, params, timeout)


async def _embed(
    requests: Requests,
    image: AnyImage | Sequence[AnyImage],
    model: str | None,
    timeout: float | None,
) -> Embedding | list[Embedding]:
    params = {"model": model, "encoding_format": "base64"}
    return await _post(requests, "/v1/embed", image, Embedding, params, timeout)


async def _post(
    requests: Requests,
    path: str,
    image: AnyImage | Sequence[AnyImage],
    result_type: type[Result],
    params: Mapping[str, str | float | None],
    timeout: float | None,
) -> Result | list[Result]:
    """Send one *image* as the body, or a list of images as a form; return a result, or a list of them."""
    is_list = isinstance(image, list | tuple)
    images: Any = image if is_list else [image]
    # Files are read, and arrays become PNGs, beside the event loop.
    if all(isinstance(one, bytes) for one in images):
        bodies = encode_images(images)
    else:
        bodies = await asyncio.to_thread(encode_images, images)
    if not bodies:
        return []

    query = {name: value for name, value in params.items() if value is not None}
    send = partial(requests.send, "POST", path, requests.limit(timeout), params=query)

    if is_list:
        return await _send_list(send, bodies, result_type)
    response = await send(content=bodies[0], headers={"Content-Type": CONTENT_TYPE})
    return _parse_results(response, result_type, 1)[0]


async def _send_list(
    send: Callable[..., Awaitable[httpx.Response]],
    bodies: Sequence[bytes],
    result_type: type[Result],
) -> list[Result]:
    """Send *bodies* as a form, or as several where they are together too much; return all results in order."""
    parts = [("image", ("image", body, CONTENT_TYPE)) for body in bodies]
    try:
        response = await send(files=parts)
    except ServiceError as error:
        if len(bodies) == 1 or not _is_too_much(error):
            raise
    else:
        return _parse_results(response, result_type, len(bodies))

    # Send each half again. An image that is too large alone gets an error as its result, and the
    # others get theirs.
    results: list[Result] = []
    middle = len(bodies) // 2
    for half in (bodies[:middle], bodies[middle:]):
        try:
            results += await _send_list(send, half, result_type)
        except ServiceError as error:
            if not _is_too_much(error):
                raise
            problem = Problem(code=error.code, status=error.status, detail=str(error))
            results.append(result_type(error=problem))
    return results


def _is_too_much(error: ServiceError) -> bool:
    """Tell whether the server takes fewer images or bytes in one request."""
    return error.status == TOO_LARGE or error.code == TOO_MANY_IMAGES


def encode_images(images: Sequence[object]) -> list[bytes]:
    """Encode each of *images* by `encode_image`; raises `DataError` that names the first that fails."""
    bodies = []
    for number, image in enumerate(images):
        with naming(name_image(image, number), DataError, ImageError):
            bodies.append(encode_image(image))
    return bodies


def _parse_results(
    response: httpx.Response, result_type: type[Result], count: int
) -> list[Result]:
    """Parse the *count* results in *response*, in the order of the images; else `ServiceError`."""
    shared = {
        "model_digest": response.headers.get("X-Model-Digest", ""),
        "timing_ms": dict(DURATION.findall(response.headers.get("Server-Timing", ""))),
    }

    try:
        body = parse_json(response.content)
        rows = body.get("results", [body])
        results = [
            result_type.model_validate({**row, **shared}, extra="ignore") for row in rows
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise foreign_answer_error(response) from error

    are_complete = all(
        result.model_fields_set & {"classes", "values", "error"} for result in results
    )
    # All fields have defaults, so the JSON of another server may have been accepted.
    if len(results) != count or not are_complete:
        raise foreign_answer_error(response)
    return results
