"""The parts of a call: options, images, deadline, delays, errors, and results.

Keys of newer servers are ignored in responses.
"""

import base64
import io
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias, TypedDict, TypeVar

import httpx
import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError, DataError, OverloadedError, ServiceError, UnreachableError
from sopdeploy.http_api import Classes, ClassProbability, Problem, ServerInfo

ImageLike: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]
Result = TypeVar("Result", bound="ImageResult")
DURATION = re.compile(r"([a-z]+);dur=(\d+(?:\.\d+)?)")

CONTENT_TYPE = "application/octet-stream"  # the server detects the format; a wrong type causes a warning
MAX_TIMEOUT = 86_400  # seconds
READY_INTERVAL = 0.2
READY_REQUEST_TIMEOUT = 5.0
FIRST_DELAY = 0.2  # seconds
MAX_DELAY = 5.0
RETRY_STATUSES = {429, 503}  # the server did not process the request
# Errors of a connection that broke before a response.
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


def address_and_key(url: str, api_key: str | None) -> dict[str, Any]:
    """Return address and headers for `httpx`; raise `ConfigError` for an invalid URL or key."""
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"{url!r}: not a URL ({error}); write it as http://host:8000") from error
    if address.scheme not in {"http", "https"} or not address.host:
        raise ConfigError(f"{url!r}: not the URL of a server; write it as http://host:8000")
    if api_key is None:
        return {"base_url": address}
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key:
        raise ConfigError(
            "the API key contains characters that are not allowed in a header"
            "; copy the key that `sopdeploy key` printed"
        )
    return {"base_url": address, "headers": {"Authorization": f"Bearer {api_key}"}}


def encode_images(images: ImageLike | Sequence[ImageLike]) -> bytes | list[bytes]:
    """Encode one image, or each image of a list or tuple; raises the errors of `encode_image`."""
    if isinstance(images, list | tuple):
        return [encode_image(image) for image in images]
    return encode_image(images)


def encode_image(image: Any) -> bytes:
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


class CallArguments(TypedDict, total=False):
    """The arguments of every call with images; `Client.classify` describes them."""

    model: str | None
    timeout: float | None


class ClassifyArguments(CallArguments, total=False):
    """The arguments of `Client.classify`."""

    top_k: int | None
    threshold: float | None
    explain: bool


@dataclass(frozen=True, slots=True)
class Deadline:
    """The end of a call, *seconds* after its start."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds until the end."""
        return self.started + self.seconds - time.monotonic()


def response_error(response: httpx.Response) -> ServiceError:
    """Convert an error response to an exception; its body may be anything, such as a proxy's HTML page."""
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError:
        problem = Problem(code="http_error", status=status, detail=response.reason_phrase or "no explanation")
    message = f"{response.request.url}: {status} {problem.code}: {problem.detail}"
    if status in RETRY_STATUSES:
        return OverloadedError(message, code=problem.code, status=status, retry_after=retry_after(response))
    return ServiceError(message, code=problem.code, status=status)


def unreachable_error(request: httpx.Request, failure: Exception, deadline: Deadline) -> UnreachableError:
    """Convert the *failure* of a request without a response to an exception."""
    if isinstance(failure, httpx.TimeoutException):
        message = f"{request.url}: no response within {deadline.seconds:.3g} s"
        error = UnreachableError(message, code="timeout", status=0)
    else:
        reason = str(failure) or type(failure).__name__
        message = f"{request.url}: no response ({reason}); is a server running there?"
        error = UnreachableError(message, code="unreachable", status=0)
    error.__cause__ = failure
    return error


def backoff(attempt: int) -> float:
    """Compute the delay in seconds before the next attempt: exponential with jitter."""
    longest = min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 10))
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - jitter needs no secure randomness


def retry_after(response: httpx.Response) -> float:
    """Parse `Retry-After` in seconds, as the server writes it; 0 without a valid value."""
    text = response.headers.get("Retry-After", "")
    return float(text[:9]) if text.isascii() and text.isdecimal() else 0.0


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

    @pydantic.model_validator(mode="after")
    def _has_result(self) -> Self:
        if not self.model_fields_set & {"classes", "values", "error"}:
            raise ValueError("neither a result nor an error")
        return self


class Embedding(ImageResult):
    """The features of one image in front of the classifier.

    Attributes:
        values: (D,) float32, read-only; empty if `error` is set.
        warnings: codes of the changes made while decoding, such as first_frame_only.
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    values: NDArray[np.float32] = pydantic.Field(np.zeros(0, np.float32), validation_alias="embedding")
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


def parse_results(response: httpx.Response, kind: type[Result]) -> list[Result]:
    """Parse the results in *response*, in the order of the images; raise `ServiceError` if invalid."""
    shared = {
        "model_digest": response.headers.get("X-Model-Digest", ""),
        "timing_ms": dict(DURATION.findall(response.headers.get("Server-Timing", ""))),
    }
    try:
        body = response.json()
        rows = body.get("results", [body])
        return [kind.model_validate({**row, **shared}, extra="ignore") for row in rows]
    except (AttributeError, TypeError, ValueError) as error:
        raise _foreign(response) from error


def parse_info(response: httpx.Response) -> ServerInfo:
    """Parse the response of `/info`; raise `ServiceError` if it is invalid."""
    try:
        return ServerInfo.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError as error:
        raise _foreign(response) from error


def _foreign(response: httpx.Response) -> ServiceError:
    status = response.status_code
    return ServiceError(
        f"{response.request.url}: status {status}, but not a sopdeploy response; check the URL",
        code="foreign_answer",
        status=status,
    )
