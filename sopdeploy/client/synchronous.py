"""The blocking client."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

import httpx

from sopdeploy.client import requests
from sopdeploy.client.requests import ClassifyOptions, ImageLike
from sopdeploy.client.results import Classification, ServerInfo, parse_server_info
from sopdeploy.client.retry import Flow, RunInThread, Send, Sleep

Value = TypeVar("Value")


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
        self._options = requests.ClientOptions(url, api_key, timeout, retries)
        self._http = httpx.Client(
            base_url=self._options.url, headers=self._options.headers, transport=transport
        )

    @overload
    def classify(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[ClassifyOptions]
    ) -> list[Classification]: ...
    @overload
    def classify(self, image: ImageLike, **options: Unpack[ClassifyOptions]) -> Classification: ...
    def classify(
        self, image: ImageLike | Sequence[ImageLike], **options: Unpack[ClassifyOptions]
    ) -> Classification | list[Classification]:
        """Classify *image*: a path, bytes, a PIL image, a uint8 array (H, W, 3) or (H, W), or a list of them.

        A list is sent as one request; an image of the list that cannot be classified has `error` set. *top_k*
        is the number of classes, *model* the model to use if the server has several. *gates* requests the
        experts that a gated network selects. *threshold* replaces the thresholds of a multi-label network.
        *explain* adds the class activation map of the best class (True) or of the class with this label.
        *timeout* replaces that of the client. Raises `ServiceError` if the server rejects the request,
        `OverloadedError` if it is overloaded, `UnreachableError` without a response in time, and `DataError`
        or `ConfigError` for an image that cannot be sent.

        Example:
            best = client.classify(np.asarray(frame), top_k=3, timeout=2.0).classes[0]
            for result in client.classify(["a.jpg", "b.jpg"], model="flowers"):
                print(result.error.detail if result.error else result.classes[0].label)
        """
        return self._run(requests.classify(image, self._options, **options))

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Request the server version and its models.

        Example:
            print([model.name for model in client.info().models])
        """
        return parse_server_info(self._run(requests.get("/info", self._options.budget(timeout))))

    def metrics(self, *, timeout: float | None = None) -> str:
        """Request the metrics in the Prometheus text format.

        Example:
            print(client.metrics())
        """
        return self._run(requests.get("/metrics", self._options.budget(timeout))).text

    def wait_ready(self, *, timeout: float = 60.0) -> None:
        """Wait until the server is ready; raise `UnreachableError` after *timeout* seconds.

        Example:
            client.wait_ready(timeout=10)
        """
        self._run(requests.wait_ready(self._options.budget(timeout)))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flow: Flow[Value]) -> Value:
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
                        result = self._http.request(**requests.httpx_arguments(action))
                    except httpx.RequestError as error:
                        result = error
                case Sleep():
                    time.sleep(action.seconds)
                    result = None
                case RunInThread():
                    result = action.function()
