"""The body of a request, read under every limit, to the bytes of its images."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from sopdeploy_service.http import strict_json as fields
from sopdeploy_service.http.auth import require
from sopdeploy_service.http.disconnect import Begun
from sopdeploy_service.http.fetch import fetch
from sopdeploy_service.http.forms import ImageForm
from sopdeploy_service.http.headers import header, text
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.http.rate_limit import TokenBucket
from sopdeploy_service.http.strict_json import bad_request, decode_text, parse
from sopdeploy_service.images.decode import EncodedImage, has_image_signature, too_large_error
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import CLIENT_GONE, DEADLINE, Rejection
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import RequestContext
from sopdeploy_service.settings import Settings

Value = TypeVar("Value")

TIMEOUT_HEADER = b"x-request-timeout-ms"
DIGITS = 9  # more milliseconds than any deadline may have; `int` refuses thousands of digits
BAD_TIMEOUT = Rejection("invalid_timeout", 400, "X-Request-Timeout-Ms: say how many milliseconds, at least 1")


def service_of(request: Request) -> Service:
    """Return the service behind the app that got *request*."""
    service: Service = request.app.state.service
    return service


def context_of(request: Request) -> RequestContext:
    """Return the state that the middleware keeps for *request*."""
    context: RequestContext = request.scope["state"]["context"]
    return context


def admit(request: Request, name: str | None = None, version: str | None = None) -> tuple[Model, float]:
    """Return the model for *request* and its deadline (`time.monotonic`), before its body is read.

    The answer will carry the model's digest. Raises `RefusedError` where its key does not allow it, the model
    is not here, or it could not answer in time.
    """
    require("classify")
    service = service_of(request)
    deadline = time.monotonic() + seconds_allowed(request, service.settings.deadline_seconds)
    model = unless_rejected(service.registry.find(name, version))
    request.scope["state"]["model"] = model
    unless_rejected(service.check_admission(model, deadline))
    limit = context_of(request).rate_limit
    if isinstance(limit, TokenBucket):
        limit.check(1)
    return model, deadline


@asynccontextmanager
async def taking_apart(service: Service, model: Model, deadline: float) -> AsyncIterator[None]:
    """Hold what finds the images of a request that has arrived to its *deadline*, and count it as one image.

    So what waits for a parser, or for the host of a URL, is bounded like all that waits. Raises
    `RefusedError`.
    """
    unless_rejected(service.check_queue(model))
    try:
        with service.reserve():
            async with asyncio.timeout(deadline - time.monotonic()):
                yield
    except TimeoutError as problem:
        raise RejectedError(DEADLINE) from problem


def seconds_allowed(request: Request, longest: float) -> float:
    """Return for how long *request* may take: what its header says, but never more than *longest*."""
    given = header(request.scope, TIMEOUT_HEADER)
    if given is None:
        return longest
    digits = given.lstrip(b"0")
    if not given.isdigit() or not digits:
        raise RejectedError(BAD_TIMEOUT)
    return longest if len(digits) > DIGITS else min(longest, int(digits) / 1000)


def unless_rejected(value: Value | Rejection) -> Value:
    """Return *value*; raises `RefusedError` where it is a refusal."""
    if isinstance(value, Rejection):
        raise RejectedError(value)
    return value


SOURCES = ("image", "images", "url")
MOST_CLASSES = 1_000_000
NO_IMAGE = Rejection("no_image", 422, "the list `images` is empty")


@dataclass(frozen=True, slots=True)
class JsonBody:
    """The *images* of a body, or the *url* of its one image; *several* is true for a list."""

    images: list[bytes]
    url: str | None
    several: bool
    top_k: int | None


def read_json(raw: bytes, max_bytes: int, max_images: int) -> JsonBody:
    """Return what the JSON document *raw* asks for; for a thread, not the event loop.

    Raises `RefusedError` where it is not of the form `{"image": ...}`, `{"images": [...]}` or `{"url": ...}`,
    each with or without `"top_k"`, or where something in it is not base64.
    """
    value = parse(raw, max_bytes)
    if not isinstance(value, dict):
        raise bad_request("malformed_request", 'the body must be an object like {"image": "<base64>"}')
    unknown = sorted(value.keys() - {*SOURCES, "top_k"})
    if unknown:
        raise bad_request(
            "malformed_request", f"unknown key {unknown[0][:100]!r}; known: {', '.join(SOURCES)}, top_k"
        )
    given = [name for name in SOURCES if name in value]
    if len(given) != 1:
        raise bad_request("malformed_request", f"give exactly one of {', '.join(SOURCES)}")
    return JsonBody(
        images=read_images(value, given[0], max_images),
        url=fields.as_text(value["url"], "url") if given == ["url"] else None,
        several=given == ["images"],
        top_k=read_top_k(value.get("top_k")),
    )


def read_images(value: dict[str, Any], given: str, max_images: int) -> list[bytes]:
    """Return the images in the key *given*; none where it is an address."""
    if given == "url":
        return []
    if given == "image":
        return [decode_text(value["image"], "image")]
    texts = value["images"]
    if not isinstance(texts, list):
        raise bad_request("malformed_request", "images: must be a list of strings of base64")
    if not texts:
        raise RejectedError(NO_IMAGE)
    if len(texts) > max_images:
        raise bad_request("too_many_images", f"images: more than {max_images}, the limit of this server")
    return [decode_text(text, f"images[{place}]") for place, text in enumerate(texts)]


def read_top_k(value: Any) -> int | None:
    """Return how many classes *value* asks for; None is no wish."""
    if value is None:
        return None
    return min(fields.as_count(value, "top_k", least=1), MOST_CLASSES)


SLOW_BODY = Rejection("slow_body", 408, "the body did not arrive before the deadline")
ENCODED = Rejection("unsupported_encoding", 415, "send the image as it is, without a Content-Encoding")
FETCHES_FULL = Rejection("fetches_full", 429, "too many URLs are being fetched; send it later", 1)
NOT_A_FORM = Rejection("unsupported_multipart", 415, "send the image alone, or as multipart/form-data")


class Upload(NamedTuple):
    """The images of one request; *several* is true where the answer is a list of results.

    *top_k* is how many classes the body itself asks for.
    """

    images: list[EncodedImage]
    several: bool
    top_k: int | None = None


async def read_upload(request: Request, service: Service, model: Model, deadline: float) -> Upload:
    """Read the body until *deadline* (`time.monotonic`) and return its images, which *model* is to classify.

    Raises `RefusedError` for whatever is wrong with the body as a whole; an image in it may still be bad.
    """
    content_type = text(request.scope, b"content-type")
    kind = content_type.partition(";")[0].strip().lower()
    settings = service.settings
    if kind != "application/json":
        return await in_time(request, read_body(request, settings, kind, content_type), deadline)
    raw = await in_time(
        request, whole(request, min(settings.max_body_bytes, settings.max_json_bytes)), deadline
    )
    if has_image_signature(raw):
        return Upload([EncodedImage(raw, content_type)], several=False)
    async with taking_apart(service, model, deadline):
        return await read_json_upload(raw, service)


async def in_time(request: Request, reading: Coroutine[Any, Any, Value], deadline: float) -> Value:
    """Return what *reading* the body gives; raises `RefusedError` where it cannot be had until *deadline*."""
    encoding = header(request.scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() != b"identity":
        reading.close()
        raise RejectedError(ENCODED)
    try:
        begun = Begun(reading)
        if begun.done:  # as nearly always: a picture comes in one piece with its head
            return begun.value
        async with asyncio.timeout(deadline - time.monotonic()):
            return await begun
    except TimeoutError as problem:
        raise RejectedError(SLOW_BODY) from problem
    except ClientDisconnect as problem:
        raise RejectedError(CLIENT_GONE) from problem


async def read_body(request: Request, settings: Settings, kind: str, content_type: str) -> Upload:
    """Read a body that is one image, or a form that holds one or several."""
    if not kind.startswith("multipart/"):
        return Upload(
            [EncodedImage(await whole(request, settings.max_body_bytes), content_type)], several=False
        )
    if kind != "multipart/form-data":
        raise RejectedError(NOT_A_FORM)
    form = ImageForm(content_type, max_images=settings.max_images)
    await read(request, settings.max_body_bytes, form.feed)
    images = form.images()
    return Upload(images, several=len(images) > 1)


async def read_json_upload(raw: bytes, service: Service) -> Upload:
    """Return what the JSON in *raw* holds: images as base64, or the URL of one, which is fetched."""
    settings = service.settings
    limit = min(settings.max_body_bytes, settings.max_json_bytes)
    body = await service.parse(read_json, raw, limit, settings.max_images)
    if body.url is None:
        return Upload([EncodedImage(image) for image in body.images], several=body.several, top_k=body.top_k)
    if service.fetches.locked():
        raise RejectedError(FETCHES_FULL)
    async with service.fetches:
        image = await fetch(body.url, settings)
    return Upload([EncodedImage(image)], several=body.several, top_k=body.top_k)


async def whole(request: Request, limit: int) -> bytes:
    """Return the body as one, of at most *limit* bytes."""
    pieces: list[bytes] = []
    await read(request, limit, pieces.append)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def read(request: Request, limit: int, take: Callable[[bytes], None]) -> None:
    """Give *take* the body piece by piece.

    Raises `RefusedError` as soon as it is known to exceed *limit*, `ClientDisconnect` where it does not end.
    """
    announced = header(request.scope, b"content-length") or b"0"
    if announced.isdigit() and int(announced[:20]) > limit:
        raise RejectedError(Rejection.of(too_large_error(limit)))
    seen, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        seen += len(piece)
        if seen > limit:
            raise RejectedError(Rejection.of(too_large_error(limit)))
        if piece:
            take(piece)
        more = message.get("more_body", False)
