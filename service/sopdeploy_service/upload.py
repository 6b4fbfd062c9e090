"""The body of a request, read under every limit, to the bytes of its images."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from sopdeploy_service.admission import taking_apart
from sopdeploy_service.begun import Begun
from sopdeploy_service.decode import Sent, begins_like_an_image, too_large
from sopdeploy_service.fetch import fetch
from sopdeploy_service.form import ImageForm
from sopdeploy_service.heads import header, text
from sopdeploy_service.json_body import read_json
from sopdeploy_service.model import Model
from sopdeploy_service.outcome import CLIENT_GONE, Refusal
from sopdeploy_service.problems import RefusedError
from sopdeploy_service.service import Service
from sopdeploy_service.settings import Settings

Value = TypeVar("Value")

SLOW_BODY = Refusal("slow_body", 408, "the body did not arrive before the deadline")
ENCODED = Refusal("unsupported_encoding", 415, "send the image as it is, without a Content-Encoding")
FETCHES_FULL = Refusal("fetches_full", 429, "too many URLs are being fetched; send it later", 1)
NOT_A_FORM = Refusal("unsupported_multipart", 415, "send the image alone, or as multipart/form-data")


class Upload(NamedTuple):
    """The images of one request; *several* is true where the answer is a list of results.

    *top_k* is how many classes the body itself asks for.
    """

    images: list[Sent]
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
    if begins_like_an_image(raw):
        return Upload([Sent(raw, content_type)], several=False)
    async with taking_apart(service, model, deadline):
        return await read_json_upload(raw, service)


async def in_time(request: Request, reading: Coroutine[Any, Any, Value], deadline: float) -> Value:
    """Return what *reading* the body gives; raises `RefusedError` where it cannot be had until *deadline*."""
    encoding = header(request.scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() != b"identity":
        reading.close()
        raise RefusedError(ENCODED)
    try:
        begun = Begun(reading)
        if begun.done:  # as nearly always: a picture comes in one piece with its head
            return begun.value
        async with asyncio.timeout(deadline - time.monotonic()):
            return await begun
    except TimeoutError as problem:
        raise RefusedError(SLOW_BODY) from problem
    except ClientDisconnect as problem:
        raise RefusedError(CLIENT_GONE) from problem


async def read_body(request: Request, settings: Settings, kind: str, content_type: str) -> Upload:
    """Read a body that is one image, or a form that holds one or several."""
    if not kind.startswith("multipart/"):
        return Upload([Sent(await whole(request, settings.max_body_bytes), content_type)], several=False)
    if kind != "multipart/form-data":
        raise RefusedError(NOT_A_FORM)
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
        return Upload([Sent(image) for image in body.images], several=body.several, top_k=body.top_k)
    if service.fetches.full:
        raise RefusedError(FETCHES_FULL)
    with service.fetches.one():
        image = await fetch(body.url, settings)
    return Upload([Sent(image)], several=body.several, top_k=body.top_k)


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
        raise RefusedError(Refusal.of(too_large(limit)))
    seen, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        seen += len(piece)
        if seen > limit:
            raise RefusedError(Refusal.of(too_large(limit)))
        if piece:
            take(piece)
        more = message.get("more_body", False)
