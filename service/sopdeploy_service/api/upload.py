"""Read the images of a request: raw, as a form, in JSON, or from a URL."""

import asyncio
import re
from typing import NamedTuple

from sopdeploy.images.formats import FIRST_BYTES
from sopdeploy_service.api.admission import AdmittedRequest
from sopdeploy_service.api.body import check_encoding
from sopdeploy_service.api.schema import ClassifyRequest
from sopdeploy_service.http.fetch import fetch
from sopdeploy_service.http.forms import ImageForm
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import decode_text, parse, validate
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.results import HttpError, RejectedError

MAX_TOP_K = 1_000_000

_NO_IMAGE = HttpError("no_image", 422, "the list `images` is empty")
FETCHES_FULL = HttpError("fetches_full", 429, "too many URLs are being fetched; retry later", 1)
STRIPPED = HttpError(
    "stripped_body",
    400,
    "curl's --data and -d remove bytes from files; send the image with --data-binary @FILE",
)
REMOVED = re.compile(rb"[\0\r\n]")  # by curl's --data; an image file has some of them
NOT_A_FORM = HttpError("unsupported_multipart", 415, "send the image itself or multipart/form-data")


class Upload(NamedTuple):
    """The images of one request, or the *url* of one.

    *is_list* selects a list as response; *top_k* is from a JSON body.
    """

    images: list[EncodedImage]
    is_list: bool = False
    top_k: int | None = None
    url: str | None = None


async def read_upload(admitted: AdmittedRequest) -> Upload:
    """Read the images of a request before its deadline: raw, as a form, or in JSON.

    Raises `RejectedError` for errors of the request as a whole; single images may still be invalid.
    """
    service, headers = admitted.service, admitted.context.headers
    settings = service.settings
    content_type = headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        check_encoding(headers)  # a compressed form has no boundary
        if kind != "multipart/form-data":
            raise RejectedError(NOT_A_FORM)
        form = ImageForm(content_type, max_images=settings.max_images)
        await admitted.read_body(settings.max_body_bytes, form.feed)
        images = form.images()
        return Upload(images, is_list=len(images) > 1)
    if kind != "application/json":
        body = await admitted.read_body(settings.max_body_bytes)
        if kind == "application/x-www-form-urlencoded" and body and not REMOVED.search(body):
            raise RejectedError(STRIPPED)
        return Upload([EncodedImage(body, content_type)])
    limit = min(settings.max_body_bytes, settings.max_json_bytes)
    body = await admitted.read_body(limit)
    if body.startswith(FIRST_BYTES):
        return Upload([EncodedImage(body, content_type)])
    async with admitted.preparing():
        loop, given = asyncio.get_running_loop(), (body, limit, settings.max_images)
        upload = await loop.run_in_executor(service.parsers, parse_upload, *given)
        if upload.url is None:
            return upload
        if service.fetches.locked():
            raise RejectedError(FETCHES_FULL)
        async with service.fetches:
            return upload._replace(images=[EncodedImage(await fetch(upload.url, settings))])


def parse_upload(raw: bytes, max_bytes: int, max_images: int) -> Upload:
    """Parse a JSON body. Call it in a thread.

    Raises `RejectedError` for anything that is not a `ClassifyRequest` with base64 images.
    """
    body = validate(ClassifyRequest, parse(raw, max_bytes))
    top_k = None if body.top_k is None else min(body.top_k, MAX_TOP_K)
    if body.images is None:
        images = [] if body.image is None else [EncodedImage(decode_text(body.image, "image"))]
        return Upload(images, top_k=top_k, url=body.url)
    if not body.images:
        raise RejectedError(_NO_IMAGE)
    if len(body.images) > max_images:
        raise bad_request("too_many_images", f"images: more than {max_images}, the limit of this server")
    images = [EncodedImage(decode_text(text, f"images[{i}]")) for i, text in enumerate(body.images)]
    return Upload(images, is_list=True, top_k=top_k)
