"""Client options, image encoding and API requests, shared by both clients."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.client.results import Classification, parse_classifications
from sopdeploy.client.retry import Flow, RetryBudget, RunInThread, Send, Sleep, send_with_retries
from sopdeploy.errors import ConfigError, DataError, ServiceError, UnreachableError

ImageLike: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]

CONTENT_TYPE = "application/octet-stream"  # the server detects the format; a wrong type causes a warning
FORM_FIELD = "image"
MAX_TIMEOUT = 86_400  # seconds
READY_INTERVAL = 0.2
READY_REQUEST_TIMEOUT = 5.0


class ClientOptions:
    """Validated options of a client."""

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int) -> None:
        """Validate the options; raise `ConfigError` for an invalid URL, key, timeout or number of retries."""
        if retries < 0:
            raise ConfigError(f"retries={retries}: use 0 or more")
        try:
            self.url = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ConfigError(f"{url!r}: not a URL ({error}); write it as http://host:8000") from error
        if self.url.scheme not in {"http", "https"} or not self.url.host:
            raise ConfigError(f"{url!r}: not the URL of a server; write it as http://host:8000")
        self.headers: dict[str, str] = {}
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key:
                raise ConfigError(
                    "the API key contains characters that are not allowed in a header"
                    "; copy the key that `sopdeploy key` printed"
                )
            self.headers["Authorization"] = f"Bearer {api_key}"
        self._retries = retries
        self._timeout = timeout
        self.budget(None)

    def budget(self, timeout: float | None) -> RetryBudget:
        """Start the time budget of a call; raise `ConfigError` for an invalid *timeout* (seconds)."""
        seconds = self._timeout if timeout is None else timeout
        if not 0 < seconds <= MAX_TIMEOUT:
            raise ConfigError(f"timeout={seconds}: use more than 0 and at most {MAX_TIMEOUT} seconds")
        return RetryBudget(seconds=seconds, retries=self._retries)


def encode_image(image: ImageLike) -> bytes:
    """Encode *image* as the bytes of an image file.

    Files and bytes are sent unchanged. PIL images and uint8 arrays (H, W, 3) or (H, W) are encoded as PNG,
    without loss. Raises `DataError` for an unreadable file and `ConfigError` for other types.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"{image}: cannot be read ({error.strerror}); check the path") from error
    if isinstance(image, np.ndarray):
        gray_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not gray_or_rgb or 0 in image.shape:
            raise ConfigError(
                f"an array of {image.dtype} {image.shape} is not an image; use (H, W, 3) or (H, W) uint8"
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise ConfigError(
            f"{type(image).__name__} is not an image; use a path, bytes, a PIL image or an array"
        )
    file = io.BytesIO()
    try:
        image.save(file, "PNG", compress_level=1)  # speed matters more than size
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a {image.mode} image cannot be saved as PNG ({error}); convert it to RGB"
        ) from error
    return file.getvalue()


def httpx_arguments(send: Send) -> dict[str, Any]:
    """Convert *send* to the arguments of `httpx.Client.request`."""
    files = [(FORM_FIELD, ("image", body, CONTENT_TYPE)) for body in send.form]
    return {
        "method": send.method,
        "url": send.path,
        "headers": dict(send.headers),
        "params": dict(send.params),
        "content": send.body,
        "files": files or None,
        "timeout": httpx.Timeout(send.seconds),
    }


class ClassifyOptions(TypedDict, total=False):
    """The options of `Client.classify`, which describes them."""

    top_k: int | None
    model: str | None
    gates: bool
    threshold: float | None
    explain: bool | str
    timeout: float | None


def classify(  # noqa: PLR0913 - the options of `Client.classify`
    images: ImageLike | Sequence[ImageLike],
    client: ClientOptions,
    *,
    top_k: int | None = None,
    model: str | None = None,
    gates: bool = False,
    threshold: float | None = None,
    explain: bool | str = False,
    timeout: float | None = None,
) -> Flow[Classification | list[Classification]]:
    """Classify one image, or a list of images in one request, with the options of `Client.classify`."""
    budget = client.budget(timeout)
    is_list = isinstance(images, list | tuple)
    items: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    if not items:
        return []
    bodies = tuple(item for item in items if isinstance(item, bytes))
    if len(bodies) < len(items):  # bytes need no encoding
        bodies = yield RunInThread(lambda: tuple(map(encode_image, items)))
    options: dict[str, Any] = {
        "top_k": top_k,
        "model": model,
        "gates": "true" if gates else None,
        "threshold": threshold,
    }
    options["explain_label" if isinstance(explain, str) else "explain"] = explain or None
    send = Send(
        method="POST",
        path="/v1/classify",
        seconds=budget.seconds,
        headers={} if is_list else {"Content-Type": CONTENT_TYPE},
        params={
            name: str(value).lower() if value is True else str(value)
            for name, value in options.items()
            if value is not None
        },
        body=None if is_list else bodies[0],
        form=bodies if is_list else (),
    )
    response = yield from send_with_retries(send, budget)
    results = parse_classifications(response)
    if len(results) != len(bodies):
        raise ServiceError(
            f"{send.path}: {len(results)} results for {len(bodies)} images; check that the URL is that of a "
            "sopdeploy server",
            code="foreign_answer",
            status=response.status_code,
        )
    return results if is_list else results[0]


def get(path: str, budget: RetryBudget) -> Flow[httpx.Response]:
    """Request *path*."""
    return send_with_retries(Send("GET", path, budget.seconds), budget)


def wait_ready(budget: RetryBudget) -> Flow[None]:
    """Poll until the server is ready; raise `UnreachableError` with the last response at the deadline."""
    last = "no request was sent"
    while budget.left() > 0:
        attempt = RetryBudget(seconds=min(READY_REQUEST_TIMEOUT, budget.left()), retries=0)
        try:
            yield from send_with_retries(Send("GET", "/readyz", attempt.seconds), attempt)
        except ServiceError as error:
            last = str(error)
        else:
            return
        yield Sleep(min(READY_INTERVAL, max(0.0, budget.left())))
    raise UnreachableError(f"not ready after {budget.seconds:.3g} s: {last}", code="not_ready", status=0)
