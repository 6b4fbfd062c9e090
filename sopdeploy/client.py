"""Client of `sopdeploy serve`, which imports neither torch nor the server.

Keys of newer servers are ignored in responses.
"""

import base64
import math
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NamedTuple, Self, TypedDict, TypeVar, Unpack, overload
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import StrictModel, parse_json
from sopdeploy.deadline import deadline, is_early, obey_deadlines
from sopdeploy.errors import (
    ConfigError,
    DataError,
    ImageError,
    OverloadedError,
    ServiceError,
    UnreachableError,
)
from sopdeploy.http_api import Classes, ClassProbability, Problem, ServerInfo
from sopdeploy.images.encode import AnyImage, encode_image, name_image, naming
from sopdeploy.proxies import HTTPX_PROXIES, describe_route, find_proxy

Result = TypeVar("Result", bound="ImageResult")

# The server detects the format; a wrong type causes a warning
CONTENT_TYPE = "application/octet-stream"
REQUEST_ID = "X-Request-ID"  # a server returns that of the request
CONNECT_SECONDS = (
    2.0  # of the total; a host that is lost answers nothing, and another one may be free
)
FIRST_DELAY = 0.2  # seconds before a retry
MAX_DELAY = 5.0
# linear, whatever a server sends
DURATION = re.compile(r"(?<![a-z])([a-z]+);dur=(\d+(?:\.\d+)?)")
MAX_RESPONSE_BYTES = 64_000_000  # after decompression
# 64 KiB of these, which httpx expands at once, are 64 MB
ENCODINGS = {"", "identity", "gzip", "deflate"}
RETRY_STATUSES = {408, 429, 503}  # the server did not process the request
UNAVAILABLE = 503  # another replica may answer
TOO_LARGE = 413  # also of a proxy
TOO_MANY_IMAGES = "too_many_images"
FOREIGN = "foreign_answer"  # code of what another server sends
# Before a response
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(
                "the API key has characters that no header may have; copy the key again"
            )

        # Few compressed bytes could fill the memory; `_receive` limits what a server compresses
        # anyway.
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

        try:
            self._url = httpx.URL(url)
            address = str(self._url.copy_with(userinfo=b""))
            # These raise `ValueError` for what a socket would refuse later.
            _ = (urlsplit(address).port, self._url.host.encode("idna"))
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(
                f"{url!r}: not a URL ({error}); write it as http://host:8000"
            ) from error
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise ConfigError(
                f"{url!r}: not a URL with a scheme and a host; write it as http://host:8000"
            )

        self._transport = transport
        self._proxy = find_proxy(address, HTTPX_PROXIES) if transport is None else None
        self._pools: dict[int, httpx.Client] = {}  # by process
        self._timeout = check_timeout(timeout)
        self._is_closed = False
        self._retries = retries

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
        replaces that of the client. Raises `ServiceError` if the server rejects the request or
        its only image, `OverloadedError` if it is overloaded, `UnreachableError` without a
        response in time, and `DataError` for what is no image.

        Arrays are (H, W, 3), (H, W, 4) or (H, W); a PIL image is turned by its EXIF tag, as its
        file is.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for result in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(result.error.detail if result.error else result.classes[0].label)
        """
        params = {
            "model": model,
            "top_k": top_k,
            "threshold": threshold,
            "explain": explain or None,
        }

        return self._post("/v1/classify", image, Classification, params, timeout)

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

        Arguments and errors are those of `classify`. The bundle must be exported with
        `--with-features`.

        Example:
            first, second = (result.values for result in client.embed(["a.jpg", "b.jpg"]))
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        """
        params = {"model": model, "encoding_format": "base64"}
        return self._post("/v1/embed", image, Embedding, params, timeout)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print([model.name for model in client.info().models])
        """
        response = self._send("GET", "/info", self._limit(timeout))
        try:
            return ServerInfo.model_validate_json(response.content, extra="ignore")
        except pydantic.ValidationError as error:
            raise _foreign_answer_error(response) from error

    def close(self) -> None:
        """Close the connections of this process; later calls are errors."""
        self._is_closed = True
        if (pool := self._pools.get(os.getpid())) is not None:
            pool.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle has: everything but the connections, which belong to this process."""
        return {**self.__dict__, "_pools": {}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connections(self) -> httpx.Client:
        """Return the connections of this process; those of the process that it was forked from stay unused.

        Two processes on one connection would read each other's responses, and a lock may be
        held for ever.
        """
        process = os.getpid()
        proxy = None if self._proxy is None else self._proxy.url

        if process not in self._pools:
            if self._transport is not None and self._pools:
                raise ConfigError(
                    "a client with a transport of its own works in one process; make another"
                )

            # A forked process has sockets of its own.
            try:
                # Certificates, which take 60 ms to load, are needed for TLS only.
                verify = self._url.scheme == "https"
                own = self._transport or obey_deadlines(
                    httpx.HTTPTransport(verify=verify, proxy=proxy)
                )
            except httpx.InvalidURL as error:
                raise ConfigError(f"{self._proxy}: not a URL ({error})") from error
            except OSError as error:
                advice = "correct or unset SSL_CERT_FILE and SSL_CERT_DIR"
                raise ConfigError(f"no certificates ({error}); {advice}") from error

            hooks = {"response": [_refuse_redirect]}
            pool = httpx.Client(
                base_url=self._url, headers=self._headers, transport=own, event_hooks=hooks
            )

            self._pools.setdefault(process, pool)  # the first of several threads
            for other in self._pools.keys() - {process}:
                self._pools.pop(other, None)
        return self._pools[process]

    def _post(
        self,
        path: str,
        image: AnyImage | Sequence[AnyImage],
        result_type: type[Result],
        params: Mapping[str, str | float | None],
        timeout: float | None,
    ) -> Result | list[Result]:
        """Send one *image* as the body, or a list of images as a form; return a result, or a list of them."""
        is_list = isinstance(image, list | tuple)
        images: Any = image if is_list else [image]
        bodies = encode_images(images)
        if not bodies:
            return []

        query = {name: value for name, value in params.items() if value is not None}
        send = partial(self._send, "POST", path, self._limit(timeout), params=query)

        if is_list:
            return _send_list(send, bodies, result_type)
        response = send(content=bodies[0], headers={"Content-Type": CONTENT_TYPE})
        return _parse_results(response, result_type, 1)[0]

    def _limit(self, timeout: float | None) -> "TimeLimit":
        """Return the end of a call that begins now."""
        seconds = self._timeout if timeout is None else check_timeout(timeout)
        return TimeLimit(seconds, time.monotonic() + seconds)

    def _send(
        self, method: str, path: str, limit: "TimeLimit", **content: Any
    ) -> httpx.Response:
        """Send a request and return its successful response, with retries until *limit*.

        Retries follow 408, 429, 503 and connections that broke before a response. The first one
        comes at once where another replica may answer. The others wait for `Retry-After`, at least.
        """
        if self._is_closed:
            raise ConfigError("the client is closed; make another one")
        seconds, end = limit
        attempt = 0
        http = self._connections()
        extensions = {"proxy": self._proxy}  # for messages

        # Each attempt gets what is left of the time, and tells the server when it ends.
        while True:
            left = max(0.001, end - time.monotonic())  # the header must be at least 1 (ms)
            timeout = httpx.Timeout(left, connect=min(left, CONNECT_SECONDS))
            request = http.build_request(
                method, path, timeout=timeout, extensions=extensions, **content
            )
            request.headers["X-Request-Timeout-Ms"] = str(int(left * 1000))
            request.headers[REQUEST_ID] = uuid4().hex
            error: ServiceError

            try:
                with deadline(end):
                    response = _receive(http, request)
            except httpx.RequestError as failure:
                error = _no_response_error(request, failure, seconds)
                delay = backoff(attempt) if attempt else 0.0
                may_retry = isinstance(failure, BROKEN) and error.code != FOREIGN
            else:
                if response.is_success:
                    return response
                error = _response_error(response)
                is_of_replica = response.status_code == UNAVAILABLE and not attempt
                delay = 0.0 if is_of_replica else backoff(attempt) + retry_after(response)
                may_retry = response.status_code in RETRY_STATUSES

            is_last = attempt == self._retries or delay >= end - time.monotonic()
            if is_last or not may_retry:
                raise error

            time.sleep(delay)
            attempt += 1


class TimeLimit(NamedTuple):
    """The *seconds* of a call, for messages, and its *end* by `time.monotonic`."""

    seconds: float
    end: float


def _send_list(
    send: Callable[..., httpx.Response], bodies: Sequence[bytes], result_type: type[Result]
) -> list[Result]:
    """Send *bodies* as a form, or as several where they are together too much; return all results in order."""
    parts = [("image", ("image", body, CONTENT_TYPE)) for body in bodies]
    try:
        response = send(files=parts)
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
            results += _send_list(send, half, result_type)
        except ServiceError as error:
            if not _is_too_much(error):
                raise
            problem = Problem(code=error.code, status=error.status, detail=str(error))
            results.append(result_type(error=problem))
    return results


def _is_too_much(error: ServiceError) -> bool:
    """Tell whether the server takes fewer images or bytes in one request."""
    return error.status == TOO_LARGE or error.code == TOO_MANY_IMAGES


def check_timeout(timeout: float) -> float:
    """Return *timeout*; raises `ConfigError` unless it is a positive number of seconds."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        raise ConfigError(
            f"is {timeout!r}; give a positive number of seconds", setting="timeout"
        )
    return timeout


def encode_images(images: Sequence[object]) -> list[bytes]:
    """Encode each of *images* by `encode_image`; raises `DataError` that names the first that fails."""
    bodies = []
    for number, image in enumerate(images):
        with naming(name_image(image, number), DataError, ImageError):
            bodies.append(encode_image(image))
    return bodies


def backoff(attempt: int) -> float:
    """Compute the delay in seconds before the next attempt: exponential with jitter."""
    # The exponent is limited, because many attempts would overflow.
    longest = min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 10))
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - jitter needs no secure randomness


def retry_after(response: httpx.Response) -> float:
    """Parse `Retry-After` in seconds, which is a number or a date; 0 without a valid value."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])  # nine digits are more seconds than any timeout has

    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if date.tzinfo is None:  # RFC 9110, section 5.6.7: dates are in GMT
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - time.time())


def _receive(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    """Send *request*, read the response and decode its content.

    Raises `ServiceError` for a redirect and for a response that no server of ours sends,
    `UnreachableError` for one that breaks off, and `httpx.RequestError` if there is no response
    to this request.
    """
    # The response must belong to this request, and come after it.
    response = client.send(request, stream=True)
    if is_early(response):
        response.close()
        raise httpx.RemoteProtocolError("a response came before its request", request=request)

    # Errors before a request is read have an id of their own, those of proxies none.
    own_id = request.headers[REQUEST_ID]
    if response.is_success and response.headers.get(REQUEST_ID, own_id) != own_id:
        response.close()
        raise httpx.RemoteProtocolError(
            "the response belongs to another request", request=request
        )

    # A limited number of bytes, in an encoding that httpx decodes.
    try:
        if response.headers.get("Content-Encoding", "").lower() not in ENCODINGS:
            raise _foreign_answer_error(response)
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            if len(content) > MAX_RESPONSE_BYTES:
                raise _foreign_answer_error(response)
    except httpx.DecodingError as error:
        raise _foreign_answer_error(response) from error
    # Not tried again: the server has done the work.
    except (httpx.NetworkError, httpx.ProtocolError) as error:
        problem = f"status {response.status_code}, but the response breaks off ({error})"
        message = f"{_address(request)}: {problem}; send it again"
        raise UnreachableError(message, code="unreachable", status=0) from error
    finally:
        response.close()

    headers = httpx.Headers(response.headers)
    # The content is decoded now, so these headers would be wrong.
    for name in ("Content-Encoding", "Content-Length", "Transfer-Encoding"):
        headers.pop(name, None)
    return httpx.Response(
        response.status_code, headers=headers, content=bytes(content), request=request
    )


def _refuse_redirect(response: httpx.Response) -> None:
    """Raise `ServiceError` for a redirect, also to what is no URL: photographs go to the server only."""
    if response.has_redirect_location:
        where = f"redirects to {response.headers['Location'][:200]!a}"
        advice = "give the URL of the server itself, or log in to the network"
        status = response.status_code
        message = f"{_address(response.request)}: status {status}, which {where}; {advice}"
        raise ServiceError(message, code="http_error", status=status)


def _response_error(response: httpx.Response) -> ServiceError:
    """Build the exception for an error response, whose body may be anything, such as a proxy's HTML page."""
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError:
        problem = Problem(
            code="http_error", status=status, detail=response.reason_phrase or "no explanation"
        )

    said = f"{status} {problem.code}: {problem.detail}"
    printable = "".join(character if character.isprintable() else " " for character in said)
    message = f"{_address(response.request)}: {printable}"

    if status in RETRY_STATUSES:
        return OverloadedError(
            message, code=problem.code, status=status, retry_after=retry_after(response)
        )
    return ServiceError(message, code=problem.code, status=status)


def _no_response_error(
    request: httpx.Request, failure: Exception, seconds: float
) -> ServiceError:
    """Build the exception for a request without a response; *failure* is why, *seconds* its time limit."""
    reason = str(failure) or type(failure).__name__
    kind: type[ServiceError] = UnreachableError
    code = "unreachable"

    if isinstance(failure, httpx.TimeoutException):
        code = "timeout"
        text = f"no response within {seconds:.3g} s"
    elif isinstance(failure, httpx.RemoteProtocolError) and getattr(
        failure.__cause__, "__context__", None
    ):
        # The parser of the response has failed. If the server has disconnected, the error has no
        # such cause.
        kind = ServiceError
        code = FOREIGN
        text = f"no HTTP response ({reason[:200]}); check the URL"
    else:
        direct = f"does it work? Without it: NO_PROXY={request.url.host}"
        advice = direct if request.extensions["proxy"] else "is a server running there?"
        text = f"no response ({reason}); {advice}"

    error = kind(f"{_address(request)}: {text}", code=code, status=0)
    error.__cause__ = failure
    return error


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
        raise _foreign_answer_error(response) from error

    are_complete = all(
        result.model_fields_set & {"classes", "values", "error"} for result in results
    )
    # All fields have defaults, so the JSON of another server may have been accepted.
    if len(results) != count or not are_complete:
        raise _foreign_answer_error(response)
    return results


def _address(request: httpx.Request) -> str:
    """Describe where *request* goes, for a message, which may end in a log: without user and password."""
    return describe_route(str(request.url.copy_with(userinfo=b"")), request.extensions["proxy"])


def _foreign_answer_error(response: httpx.Response) -> ServiceError:
    status = response.status_code
    message = f"{_address(response.request)}: status {status}, but not a sopdeploy response; check the URL"
    return ServiceError(message, code=FOREIGN, status=status)
