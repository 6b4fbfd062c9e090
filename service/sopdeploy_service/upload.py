"""The body of a request, read under every limit, to the bytes of its images."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

from sopdeploy_service.decode import Sent, too_large
from sopdeploy_service.form import ImageForm
from sopdeploy_service.outcome import CLIENT_GONE, Refusal
from sopdeploy_service.problems import RefusedError
from sopdeploy_service.settings import Settings

SLOW_BODY = Refusal("slow_body", 408, "the body did not arrive before the deadline")
ENCODED = Refusal("unsupported_encoding", 415, "send the image as it is, without a Content-Encoding")
NOT_A_FORM = Refusal("unsupported_multipart", 415, "send the image alone, or as multipart/form-data")


@dataclass(frozen=True, slots=True)
class Upload:
    """The images of one request; *several* is true where the answer is a list of results."""

    images: list[Sent]
    several: bool


async def read_upload(request: Request, settings: Settings, deadline: float) -> Upload:
    """Read the body until *deadline* (`time.monotonic`) and return its images.

    Raises `RefusedError` for whatever is wrong with the body as a whole; an image in it may still be bad.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedError(ENCODED)
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await read_body(request, settings)
    except TimeoutError as problem:
        raise RefusedError(SLOW_BODY) from problem
    except ClientDisconnect as problem:
        raise RefusedError(CLIENT_GONE) from problem


async def read_body(request: Request, settings: Settings) -> Upload:
    """Read a body that is one image, or a form that holds one or several."""
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if not kind.startswith("multipart/"):
        whole = bytearray()
        async for piece in pieces(request, settings.max_body_bytes):
            whole += piece
        return Upload([Sent(bytes(whole), content_type)], several=False)
    if kind != "multipart/form-data":
        raise RefusedError(NOT_A_FORM)
    form = ImageForm(content_type, max_images=settings.max_images)
    async for piece in pieces(request, settings.max_body_bytes):
        form.feed(piece)
    images = form.images()
    return Upload(images, several=len(images) > 1)


async def pieces(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body piece by piece; raises `RefusedError` as soon as it is known to exceed *limit*."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise RefusedError(Refusal.of(too_large(limit)))
    seen = 0
    async for piece in request.stream():
        seen += len(piece)
        if seen > limit:
            raise RefusedError(Refusal.of(too_large(limit)))
        yield piece
