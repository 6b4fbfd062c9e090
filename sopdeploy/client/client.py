"""Clients of `sopdeploy serve`, which import neither torch nor the server.

`Client` is a thin face of `httpx.Client`, and `AsyncClient` of `httpx.AsyncClient`. Both repeat
requests as `client_requests.Attempts` says. Keys of newer servers are ignored in responses.
"""

import asyncio
import base64
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack, overload

import httpx
import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import StrictModel, parse_json
from sopdeploy.bundle.http_api import Classes, ClassProbability, Problem, ServerInfo
from sopdeploy.client.requests import (
    Attempts,
    check_timeout,
    configuring,
    foreign_answer_error,
    http_options,
)
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images.encode import AnyImage, encode_image, name_image, naming

Result = TypeVar("Result", bound="ImageResult")

# The server detects the format; a wrong type causes a warning
CONTENT_TYPE = "application/octet-stream"
# linear, whatever a server sends
DURATION = re.compile(r"(?<![a-z])([a-z]+);dur=(\d+(?:\.\d+)?)")


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


class Client:
    """Blocking client of the server at *url*, for any number of threads.

    *timeout* is the time of a call in seconds. Until it is over, a request is repeated after a
    connection that was refused or broken, and after the status 408, 429, 502, 503 or 504. The
    pauses are random and double from 0.1 to 2 s, and `Retry-After` is added to them. Each attempt
    has the timeouts of httpx: the time that is left for each wait, and at most 2 s to open a
    connection. *retries* limits the repetitions; 0 turns them off.

    Other *options* are those of `httpx.Client`, such as `transport`, `proxy`, `verify`, `limits`
    and `trust_env`, and have its defaults. Make a client in each process, because two
    processes must not share connections. Raises `ConfigError` for a URL, key, timeout, proxy or
    certificate file that cannot be used.

        with Client("http://127.0.0.1:8000") as client:
            print(client.classify("photo.jpg").classes[0].label)
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int | None = None,
        **options: Any,
    ) -> None:
        self._timeout = check_timeout(timeout)
        self._retries = retries
        with configuring():
            self._http = httpx.Client(**http_options(url, api_key, options))

    @overload
    def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyArguments]
    ) -> list[Classification]: ...
    @overload
    def classify(
        self, image: AnyImage, **options: Unpack[ClassifyArguments]
    ) -> Classification: ...
    def classify(self, image: Any, **options: Unpack[ClassifyArguments]) -> Any:
        """Classify *image*: a path, bytes, a file, a PIL image, a uint8 array, or a list of them.

        A list is sent as one request. If one of its images cannot be classified, its result has
        `error` set. *top_k* is the number of classes, *model* the model to use if the server has
        several. *threshold* replaces the thresholds of a multi-label network. *explain* requests
        the `explanation` of the first class; an image then counts as 50 for the server. *timeout*
        replaces the timeout of the client. Raises `ServiceError` if the server rejects the request
        or its only image, `OverloadedError` if it refuses until the time is over,
        `UnreachableError` without a response in time, and `DataError` for what is not an image.

        Arrays are (H, W, 3), (H, W, 4) or (H, W), or the bytes of a file, (N,) or (N, 1), as
        OpenCV encodes one. A PIL image is turned by its EXIF tag, as its file is.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for result in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(result.error.detail if result.error else result.classes[0].label)
        """
        return self._run(_classification(image, **options))

    @overload
    def embed(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallArguments]
    ) -> list[Embedding]: ...
    @overload
    def embed(self, image: AnyImage, **options: Unpack[CallArguments]) -> Embedding: ...
    def embed(self, image: Any, **options: Unpack[CallArguments]) -> Any:
        """Compute the features of *image*, or of a list of images, in front of the classifier.

        It takes the arguments *model* and *timeout* of `classify`, and raises the same errors. The
        bundle must be exported with `--with-features`.

        Example:
            first, second = (result.values for result in client.embed(["a.jpg", "b.jpg"]))
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        """
        return self._run(_embedding(image, **options))

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print([model.name for model in client.info().models])
        """
        return _parse_info(self._send(timeout, "GET", "/info"))

    def close(self) -> None:
        """Close the connections; later calls are errors of httpx."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: "_Call[Result]") -> Result | list[Result]:
        bodies = encode_images(call.images)
        if not bodies:
            return []
        response = self._send(call.timeout, "POST", call.path, **call.content(bodies))
        return call.parse(response)

    def _send(
        self, timeout: float | None, method: str, path: str, **content: Any
    ) -> httpx.Response:
        seconds = self._timeout if timeout is None else check_timeout(timeout)
        attempts = Attempts(self._http, seconds, self._retries, method, path, content)

        while True:
            try:
                response = self._http.send(attempts.next_request())
            except httpx.RequestError as failure:
                pause = attempts.pause_after_failure(failure)
            else:
                if attempts.are_answered_by(response):
                    return response
                pause = attempts.pause_after(response)
            time.sleep(pause)


class AsyncClient:
    """Client of the server at *url* for programs with asyncio, such as FastAPI services.

    It has the arguments, methods and errors of `Client`, but the methods are awaited, and other
    *options* are those of `httpx.AsyncClient`. Any number of tasks of one event loop may share it;
    a call that is cancelled ends its request. Files are read and arrays encoded in a thread.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            print((await client.classify("photo.jpg")).classes[0].label)
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int | None = None,
        **options: Any,
    ) -> None:
        self._timeout = check_timeout(timeout)
        self._retries = retries
        with configuring():
            self._http = httpx.AsyncClient(**http_options(url, api_key, options))

    @overload
    async def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyArguments]
    ) -> list[Classification]: ...
    @overload
    async def classify(
        self, image: AnyImage, **options: Unpack[ClassifyArguments]
    ) -> Classification: ...
    async def classify(self, image: Any, **options: Unpack[ClassifyArguments]) -> Any:
        """Do what `Client.classify` does, without blocking the event loop."""
        return await self._run(_classification(image, **options))

    @overload
    async def embed(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallArguments]
    ) -> list[Embedding]: ...
    @overload
    async def embed(self, image: AnyImage, **options: Unpack[CallArguments]) -> Embedding: ...
    async def embed(self, image: Any, **options: Unpack[CallArguments]) -> Any:
        """Do what `Client.embed` does, without blocking the event loop."""
        return await self._run(_embedding(image, **options))

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models."""
        return _parse_info(await self._send(timeout, "GET", "/info"))

    async def close(self) -> None:
        """Close the connections; later calls are errors of httpx."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: "_Call[Result]") -> Result | list[Result]:
        # Files are read, and arrays become PNGs, beside the event loop.
        if all(isinstance(image, bytes) for image in call.images):
            bodies = encode_images(call.images)
        else:
            bodies = await asyncio.to_thread(encode_images, call.images)
        if not bodies:
            return []
        response = await self._send(call.timeout, "POST", call.path, **call.content(bodies))
        return call.parse(response)

    async def _send(
        self, timeout: float | None, method: str, path: str, **content: Any
    ) -> httpx.Response:
        seconds = self._timeout if timeout is None else check_timeout(timeout)
        attempts = Attempts(self._http, seconds, self._retries, method, path, content)

        while True:
            try:
                response = await self._http.send(attempts.next_request())
            except httpx.RequestError as failure:
                pause = attempts.pause_after_failure(failure)
            else:
                if attempts.are_answered_by(response):
                    return response
                pause = attempts.pause_after(response)
            await asyncio.sleep(pause)


@dataclass(frozen=True)
class _Call(Generic[Result]):
    """A call with *images*: what it sends to *path*, and how its response is read."""

    path: str
    images: Sequence[object]
    is_list: bool
    result_type: type[Result]
    params: Mapping[str, str | float | None]
    timeout: float | None

    def content(self, bodies: Sequence[bytes]) -> dict[str, Any]:
        """Return what a request has: one image as its body, a list of images as a form."""
        query = {name: value for name, value in self.params.items() if value is not None}
        if self.is_list:
            parts = [("image", ("image", body, CONTENT_TYPE)) for body in bodies]
            return {"params": query, "files": parts}
        headers = {"Content-Type": CONTENT_TYPE}
        return {"params": query, "content": bodies[0], "headers": headers}

    def parse(self, response: httpx.Response) -> Result | list[Result]:
        """Return the result for the only image, or a list of the results in order."""
        results = _parse_results(response, self.result_type, len(self.images))
        return results if self.is_list else results[0]


def _classification(
    image: Any,
    *,
    model: str | None = None,
    timeout: float | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    explain: bool = False,
) -> _Call[Classification]:
    is_list = isinstance(image, list | tuple)
    params = {
        "model": model,
        "top_k": top_k,
        "threshold": threshold,
        "explain": explain or None,
    }
    images = image if is_list else [image]
    return _Call("/v1/classify", images, is_list, Classification, params, timeout)


def _embedding(
    image: Any, *, model: str | None = None, timeout: float | None = None
) -> _Call[Embedding]:
    is_list = isinstance(image, list | tuple)
    params = {"model": model, "encoding_format": "base64"}
    images = image if is_list else [image]
    return _Call("/v1/embed", images, is_list, Embedding, params, timeout)


def _parse_info(response: httpx.Response) -> ServerInfo:
    try:
        return ServerInfo.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError as error:
        raise foreign_answer_error(response) from error


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
