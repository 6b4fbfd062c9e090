"""The client to block on."""

import time
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


class Client:
    """Asks the server at *url*; thread-safe, and keeps its connections until it is closed.

    *timeout* is the seconds of a whole call, attempts and pauses together; *retries* how often a request is
    sent again after 429, 503 or a connection that broke before an answer.

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
        self._connection = Connection(url, api_key, timeout, retries)
        self._http = httpx.Client(
            base_url=self._connection.url, headers=self._connection.headers, transport=transport
        )

    @overload
    def classify(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        top_k: int | None = ...,
        model: str | None = ...,
        gates: bool = ...,
        timeout: float | None = ...,
    ) -> list[Classification]: ...
    @overload
    def classify(
        self,
        image: Picture,
        *,
        top_k: int | None = ...,
        model: str | None = ...,
        gates: bool = ...,
        timeout: float | None = ...,
    ) -> Classification: ...
    def classify(
        self,
        image: Picture | Sequence[Picture],
        *,
        top_k: int | None = None,
        model: str | None = None,
        gates: bool = False,
        timeout: float | None = None,
    ) -> Classification | list[Classification]:
        """Return the classes of *image*: a path, bytes, a PIL image, an array (H, W, 3) uint8, or a list.

        A list is one request; a bad image among several has its `error` set. *gates* asks for the experts
        that a gated network chose. Raises `ServiceError` where the server refuses the request,
        `OverloadedError` where it went on to do so for now, `UnreachableError` without an answer in time,
        `DataError` and `ConfigError` for a picture that cannot be sent.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for found in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(found.error.detail if found.error else found.classes[0].label)
        """
        return self._do(requests.classify(image, top_k, model, gates, self._connection.patience(timeout)))

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return which networks answer.

        Example:
            print([model.name for model in client.info().models])
        """
        return self._do(requests.info(self._connection.patience(timeout)))

    def metrics(self, *, timeout: float | None = None) -> str:
        """Return the server's numbers in Prometheus' text form.

        Example:
            print(client.metrics())
        """
        return self._do(requests.metrics(self._connection.patience(timeout)))

    def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Return when the server is ready; raises `UnreachableError` where it is not within *timeout*.

        Example:
            client.wait_ready(timeout=10)
        """
        self._do(requests.wait_ready(self._connection.patience(timeout)))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, talk: Talk[Value]) -> Value:
        outcome: Any = None
        try:
            while True:
                outcome = self._step(talk.send(outcome))
        except StopIteration as end:
            value: Value = end.value
            return value

    def _step(self, step: Step) -> Any:
        match step:
            case Send():
                try:
                    return self._http.request(**request_options(step))
                except httpx.RequestError as problem:
                    return problem
            case Pause():
                return time.sleep(step.seconds)
            case Compute():
                return step.function()
