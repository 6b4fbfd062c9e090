"""`Client`: requests with retries until a deadline."""

import time
from collections.abc import Sequence
from typing import Any, Self, Unpack, overload

import httpx
import pydantic

from sopdeploy.client.messages import (
    BROKEN,
    CONTENT_TYPE,
    MAX_TIMEOUT,
    READY_INTERVAL,
    READY_REQUEST_TIMEOUT,
    RETRY_STATUSES,
    CallArguments,
    Classification,
    ClassifyArguments,
    Deadline,
    Embedding,
    ImageLike,
    Result,
    address_and_key,
    backoff,
    encode_images,
    parse_info,
    parse_results,
    response_error,
    retry_after,
    unreachable_error,
)
from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError, ServiceError, UnreachableError
from sopdeploy.http_api import ClassifyQuery, EmbedQuery, ServerInfo


class Client:
    """Blocking client of the server at *url*. Thread-safe; connections stay open until `close`.

    *timeout* is the total time of a call in seconds, including retries. *retries* is how often a request is
    repeated after 429, 503 or a connection that broke before a response. Raises `ConfigError` for a value out
    of range.

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
        self._timeout, self._retries = timeout, retries
        if retries < 0:
            raise ConfigError(f"retries={retries}: use 0 or more")
        self._deadline(None)

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
        is the number of classes, *model* the model to use if the server has several. *threshold*
        replaces the thresholds of a multi-label network.
        *explain* requests the `explanation` of the first class; an image then counts as 50 for the server.
        *timeout* replaces that of the client. Raises `ServiceError` if the server rejects the request,
        `OverloadedError` if it is overloaded, `UnreachableError` without a response in time, and `DataError`
        or `ConfigError` for an image that cannot be sent.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for result in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(result.error.detail if result.error else result.classes[0].label)
        """
        return self._post("/v1/classify", image, Classification, ClassifyQuery, {**options})

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
        query = {**options, "encoding_format": "base64"}
        return self._post("/v1/embed", image, Embedding, EmbedQuery, query)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print([model.name for model in client.info().models])
        """
        return parse_info(self._send("GET", "/info", self._deadline(timeout)))

    def metrics(self, *, timeout: float | None = None) -> str:
        """Request the metrics in the Prometheus text format.

        Example:
            print(client.metrics())
        """
        return self._send("GET", "/metrics", self._deadline(timeout)).text

    def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Wait until the server is ready; raise `UnreachableError` with its last response after *timeout* s.

        Example:
            client.wait_ready(timeout=10)
        """
        deadline, last = self._deadline(timeout), "no request was sent"
        while (left := deadline.left()) > 0:
            try:
                self._send("GET", "/readyz", Deadline(min(READY_REQUEST_TIMEOUT, left)), retries=0)
            except ServiceError as error:
                last = str(error)
            else:
                return
            time.sleep(min(READY_INTERVAL, max(0.0, deadline.left())))
        raise UnreachableError(f"not ready after {timeout:.3g} s: {last}", code="not_ready", status=0)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(
        self,
        path: str,
        image: ImageLike | Sequence[ImageLike],
        kind: type[Result],
        query: type[ClassifyQuery | EmbedQuery],
        options: dict[str, Any],
    ) -> Result | list[Result]:
        """Send one image as the body, or several as a form; return the results."""
        body = encode_images(image)
        deadline = self._deadline(options.pop("timeout", None))
        if not body:
            return []
        content: dict[str, Any] = {"content": body, "headers": {"Content-Type": CONTENT_TYPE}}
        if isinstance(body, list):
            content = {"files": [("image", ("image", each, CONTENT_TYPE)) for each in body]}
        try:
            params = query.model_validate(options, extra="forbid").model_dump(exclude_defaults=True)
        except pydantic.ValidationError as error:
            raise ConfigError(first_problem(error)) from error
        response = self._send("POST", path, deadline, params=params, **content)
        results = parse_results(response, kind)
        expected = len(body) if isinstance(body, list) else 1
        if len(results) != expected:
            raise ServiceError(
                f"{response.request.url}: {len(results)} results for {expected} images; check the URL",
                code="foreign_answer",
                status=response.status_code,
            )
        return results if isinstance(body, list) else results[0]

    def _deadline(self, timeout: float | None) -> Deadline:
        seconds = self._timeout if timeout is None else timeout
        if not 0 < seconds <= MAX_TIMEOUT:
            raise ConfigError(f"timeout={seconds}: use more than 0 and at most {MAX_TIMEOUT} seconds")
        return Deadline(seconds)

    def _send(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        retries: int | None = None,
        headers: dict[str, str] | None = None,
        **content: Any,
    ) -> httpx.Response:
        """Send a request and return its successful response, with retries before *deadline*.

        Each request tells the server the remaining time. Retries follow 429, 503 and connections that broke
        before a response, after a delay of at least `Retry-After`. Raises `OverloadedError` or
        `UnreachableError` when time or attempts are used up, and `ServiceError` for responses that a retry
        would not change.
        """
        retries, attempt = self._retries if retries is None else retries, 0
        while True:
            left = max(0.001, deadline.left())
            all_headers = {**(headers or {}), "X-Request-Timeout-Ms": str(int(left * 1000))}
            request = self._http.build_request(method, path, timeout=left, headers=all_headers, **content)
            error: ServiceError
            try:
                response = self._http.send(request)
            except httpx.RequestError as failure:
                error, may_retry = unreachable_error(request, failure, deadline), isinstance(failure, BROKEN)
                delay = backoff(attempt)
            else:
                if response.is_success:
                    return response
                error, may_retry = response_error(response), response.status_code in RETRY_STATUSES
                delay = backoff(attempt) + retry_after(response)
            if not may_retry or attempt == retries or delay >= deadline.left():
                raise error
            time.sleep(delay)
            attempt += 1
