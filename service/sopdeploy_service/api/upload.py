"""Read the body of a request under limits of size, time, rate and memory, and the images in it.

The memory budget counts the bytes of a body from their arrival until the end of the request. It does not
count announced bytes, because a client could then use up the budget with a header. A compressed body is
decompressed in steps, and limits and budget apply to the decompressed bytes.
"""

import asyncio
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import NamedTuple

from fastapi import Request

from sopdeploy.images.formats import FIRST_BYTES, too_large_error
from sopdeploy_service.api.admission import AdmittedRequest
from sopdeploy_service.api.schema import ClassifyRequest
from sopdeploy_service.http.forms import ImageForm
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import decode_text, parse, validate
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.results import CLIENT_GONE, HttpError, RejectedError
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import RequestContext

SMALL_BODY = 1_000_000  # most images are smaller; the last eighth of the budget is reserved for such bodies

STEP_BYTES = 1 << 18  # to decompress at once
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # RFC 1952; RFC 1950, as RFC 9110 says

NOT_COMPRESSED = HttpError(
    "bad_encoding", 400, "the body is not one complete stream of the format that its Content-Encoding names"
)
UNKNOWN_ENCODING = HttpError("unsupported_encoding", 415, "send Content-Encoding gzip or deflate, or none")
ENCODED = HttpError("unsupported_encoding", 415, "send the image itself, without a Content-Encoding")
SLOW_BODY = HttpError("slow_body", 408, "the body arrives more slowly than this server allows")
LATE_BODY = HttpError("slow_body", 408, "the body did not arrive before the deadline")
UPLOADS_FULL = HttpError("uploads_full", 429, "too many bytes are being uploaded; retry later", 2)
MAX_TOP_K = 1_000_000

_NO_IMAGE = HttpError("no_image", 422, "the list `images` is empty")
STRIPPED = HttpError(
    "stripped_body",
    400,
    "curl's --data and -d remove bytes from files; send the image with --data-binary @FILE",
)
REMOVED = re.compile(rb"[\0\r\n]")
NOT_A_FORM = HttpError("unsupported_multipart", 415, "send the image itself or multipart/form-data")


class Upload(NamedTuple):
    """The images of one request; *is_list* selects a list as response, *top_k* is from a JSON body."""

    images: list[EncodedImage]
    is_list: bool = False
    top_k: int | None = None


async def read_upload(admitted: AdmittedRequest) -> Upload:
    """Read the images of a request before its deadline: raw, as a form, or in JSON.

    Raises `RejectedError` for errors of the request as a whole; single images may still be invalid.
    """
    service, headers, deadline = admitted.service, admitted.context.headers, admitted.deadline
    request, settings = admitted.request, service.settings
    content_type = headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        check_encoding(headers)  # a compressed form has no boundary
        if kind != "multipart/form-data":
            raise RejectedError(NOT_A_FORM)
        form = ImageForm(content_type, max_images=settings.max_images)
        await read_body(request, service, settings.max_body_bytes, deadline, form.feed)
        images = form.images()
        return Upload(images, is_list=len(images) > 1)
    if kind != "application/json":
        body = await read_body(request, service, settings.max_body_bytes, deadline)
        # curl's --data sends this type, and removes bytes that every image file has.
        if kind == "application/x-www-form-urlencoded" and body and not REMOVED.search(body):
            raise RejectedError(STRIPPED)
        return Upload([EncodedImage(body, content_type)])
    limit = min(settings.max_body_bytes, settings.max_json_bytes)
    body = await read_body(request, service, limit, deadline)
    if body.startswith(FIRST_BYTES):  # an image file, which some clients label as JSON
        return Upload([EncodedImage(body, content_type)])
    async with admitted.preparing():
        parse_body = partial(parse_upload, body, limit, settings.max_images)
        return await asyncio.get_running_loop().run_in_executor(service.parsers, parse_body)


def parse_upload(raw: bytes, max_bytes: int, max_images: int) -> Upload:
    """Parse a JSON body. Call it in a thread.

    Raises `RejectedError` for anything that is not a `ClassifyRequest` with base64 images.
    """
    body = validate(ClassifyRequest, parse(raw, max_bytes))
    top_k = None if body.top_k is None else min(body.top_k, MAX_TOP_K)
    if body.image is not None:
        return Upload([EncodedImage(decode_text(body.image, "image"))], top_k=top_k)
    if not body.images:
        raise RejectedError(_NO_IMAGE)
    if len(body.images) > max_images:
        raise bad_request("too_many_images", f"images: more than {max_images}, the limit of this server")
    images = [EncodedImage(decode_text(text, f"images[{i}]")) for i, text in enumerate(body.images)]
    return Upload(images, is_list=True, top_k=top_k)


async def read_body(
    request: Request,
    service: Service,
    limit: int,
    deadline: float,
    consume: Callable[[bytes], None] | None = None,
    *,
    decompress: bool = False,
) -> bytes:
    """Read the body of *request*, at most *limit* bytes, before *deadline*; *consume* gets it in pieces.

    A client may be slower than the minimum rate for a grace period in total. With *decompress*, the body may
    be compressed. Returns the body, empty with *consume*. Raises `RejectedError`: 400 not compressed as
    announced, 408 too slow, 413 too large, 415 for another Content-Encoding, 429 for a full budget, 499
    client disconnected.
    """
    context: RequestContext = request.scope["state"]["context"]
    settings = service.settings
    stream = _decompressor(context.headers, allowed=decompress)
    announced = int(context.headers.get("content-length", "0"))
    pieces: list[bytes] = []
    received = 0  # before decompression
    grace, more = settings.body_grace_seconds, True
    while more:
        # Also before the first byte: a client that waits for `100 Continue` must not send the body in vain.
        _check_budget(service, context.bytes, max(0, announced - context.bytes))
        started = time.monotonic()
        try:
            async with asyncio.timeout(min(grace, deadline - started)):
                message = await request.receive()
        except TimeoutError as problem:
            raise RejectedError(LATE_BODY if time.monotonic() >= deadline else SLOW_BODY) from problem
        if message["type"] == "http.disconnect":
            raise RejectedError(CLIENT_GONE)
        piece = message.get("body", b"")
        waited = time.monotonic() - started
        grace = min(settings.body_grace_seconds, grace - waited + len(piece) / settings.min_body_rate)
        received += len(piece)
        async for part in _decompressed(stream, piece, service):
            _check_budget(service, context.bytes, len(part))
            service.upload_bytes += len(part)
            context.bytes += len(part)
            if max(received, context.bytes) > limit:
                raise RejectedError(HttpError.of(too_large_error(limit)))
            if part:
                (consume or pieces.append)(part)
        more = message.get("more_body", False)
    if stream is not None and not stream.eof:
        raise RejectedError(NOT_COMPRESSED)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_encoding(headers: Mapping[str, str]) -> None:
    """Raise `RejectedError` (415) for a body with a Content-Encoding."""
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RejectedError(ENCODED)


def _decompressor(headers: Mapping[str, str], *, allowed: bool) -> "zlib._Decompress | None":
    """Create what decompresses a body with *headers*; None if it is not compressed."""
    if not allowed:
        check_encoding(headers)
        return None
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", *WINDOW_BITS}:
        raise RejectedError(UNKNOWN_ENCODING)
    return zlib.decompressobj(WINDOW_BITS[encoding]) if encoding in WINDOW_BITS else None


async def _decompressed(
    stream: "zlib._Decompress | None", piece: bytes, service: Service
) -> AsyncIterator[bytes]:
    """Yield *piece*, or what *stream* makes of it: at most `STEP_BYTES` at once, each in a thread."""
    if stream is None:
        yield piece
        return
    run = asyncio.get_running_loop().run_in_executor
    part = piece
    while part:
        try:
            part = await run(service.parsers, stream.decompress, piece, STEP_BYTES)
        except zlib.error as problem:
            raise RejectedError(NOT_COMPRESSED) from problem
        if stream.unused_data:  # not kept: zlib would collect it without limit
            raise RejectedError(NOT_COMPRESSED)
        yield part
        piece = stream.unconsumed_tail


def _check_budget(service: Service, received: int, more: int) -> None:
    """Raise `RejectedError` (429) if a body of *received* bytes may not grow by *more* bytes."""
    budget = service.max_upload_bytes
    if received + more > SMALL_BODY:
        budget = budget * 7 // 8
    if service.upload_bytes + more > budget:
        raise RejectedError(UPLOADS_FULL)
