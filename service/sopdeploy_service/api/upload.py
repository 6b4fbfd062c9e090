"""Admit a request and read its body, under all limits, into encoded images."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import orjson
import pydantic
from fastapi import Request, Response

from sopdeploy.config import first_problem
from sopdeploy.images.formats import FIRST_BYTES
from sopdeploy_service.api.body import check_encoding, read_body
from sopdeploy_service.api.schema import ClassifyRequest
from sopdeploy_service.http.fetch import fetch
from sopdeploy_service.http.forms import ImageForm
from sopdeploy_service.http.middleware import cancel_on_disconnect, require
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import decode_text, parse
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import DEADLINE, Outcome, RejectedError, Rejection
from sopdeploy_service.inference.service import Images, Service
from sopdeploy_service.observability.request_context import RequestContext

Value = TypeVar("Value")

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_DIGITS = 9  # more milliseconds than any timeout; `int` rejects thousands of digits
MAX_TOP_K = 1_000_000

BAD_TIMEOUT = Rejection("invalid_timeout", 400, "X-Request-Timeout-Ms: must be an integer of at least 1 (ms)")
NO_IMAGE = Rejection("no_image", 422, "the list `images` is empty")
FETCHES_FULL = Rejection("fetches_full", 429, "too many URLs are being fetched; retry later", 1)
NOT_A_FORM = Rejection("unsupported_multipart", 415, "send the image itself or multipart/form-data")


class Upload(NamedTuple):
    """The images of one request, or the *url* of one.

    *is_list* selects a list as response; *top_k* is from a JSON body.
    """

    images: list[EncodedImage]
    is_list: bool = False
    top_k: int | None = None
    url: str | None = None


def service_of(request: Request) -> Service:
    """Return the `Service` of the app that handles *request*."""
    service: Service = request.app.state.service
    return service


def json_response(
    body: pydantic.BaseModel | dict[str, Any] | list[Any],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Create a JSON response; fields of a model that are None are omitted."""
    value = body.model_dump(exclude_none=True) if isinstance(body, pydantic.BaseModel) else body
    return Response(orjson.dumps(value), status_code=status, headers=headers, media_type="application/json")


@asynccontextmanager
async def admit(
    request: Request, name: str | None = None, version: str | None = None
) -> AsyncIterator[tuple[Model, float]]:
    """Choose the model and the deadline (`time.monotonic`) of *request* before its body is read.

    With a memory budget, the request may wait until the model is loaded. The model stays loaded during the
    block. Raises `RejectedError` if the key lacks the scope, the model is
    not loaded, the deadline cannot be met, or the queue or the rate limit is full.
    """
    context: RequestContext = request.state.context
    service = service_of(request)
    require(context, "classify")
    deadline = time.monotonic() + timeout_of(request, service.settings.request_timeout)
    with service.registry.use(name, version) as model:
        use_model(request, model)
        service.check_admission(model, deadline)
        if context.rate_limit is not None:
            context.rate_limit.spend(1, check_only=True)
        if not model.is_loaded:
            began = time.monotonic()
            async with preparing(service, model, deadline):
                model = await service.registry.wait_until_loaded(model)
            waited = time.monotonic() - began
            service.metrics.stage("load", waited)
            context.record_stage("load", waited)
        yield model, deadline


def use_model(request: Request, model: Model) -> Model:
    """Record *model* as that of *request*, for the digest header, the metrics and the access log."""
    context: RequestContext = request.state.context
    context.model_name, context.model_version = model.name, model.version
    return model


def timeout_of(request: Request, longest: float) -> float:
    """Return the timeout of *request* in seconds: its `X-Request-Timeout-Ms`, at most *longest*."""
    given = request.state.context.headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest
    digits = given.lstrip("0")
    if not (given.isascii() and given.isdigit()) or not digits:
        raise RejectedError(BAD_TIMEOUT)
    return longest if len(digits) > MAX_TIMEOUT_DIGITS else min(longest, int(digits) / 1000)


@asynccontextmanager
async def preparing(service: Service, model: Model, deadline: float) -> AsyncIterator[None]:
    """Count a request as one queued image while its model is loaded, its body parsed or its URL fetched.

    Raises `RejectedError` if the queue is full or the block does not end before *deadline*.
    """
    with service.admitting(model):
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                yield
        except TimeoutError as problem:
            raise RejectedError(DEADLINE) from problem


async def run(
    request: Request,
    model: Model,
    images: Images,
    deadline: float,
    started: float,
    *,
    features: bool,
) -> list[Outcome]:
    """Run `Service.infer` for a request that was received since *started*; a disconnect cancels it."""
    service, context = service_of(request), request.state.context
    received = time.monotonic()
    seconds = received - started - context.stage_seconds.get("load", 0.0)
    service.metrics.stage("receive", seconds)
    context.record_stage("receive", seconds, received)
    work = service.infer(model, images, deadline, context, features=features)
    return await cancel_on_disconnect(work, request.receive)


async def read_upload(request: Request, service: Service, model: Model, deadline: float) -> Upload:
    """Read the images of *request* before *deadline*: raw, as a form, or in JSON.

    Raises `RejectedError` for errors of the request as a whole; single images may still be invalid.
    """
    settings = service.settings
    headers: Mapping[str, str] = request.state.context.headers
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
        return Upload([EncodedImage(body, content_type)])
    limit = min(settings.max_body_bytes, settings.max_json_bytes)
    body = await read_body(request, service, limit, deadline)
    if body.startswith(FIRST_BYTES):
        return Upload([EncodedImage(body, content_type)])
    async with preparing(service, model, deadline):
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
    value = parse(raw, max_bytes)
    try:
        body = ClassifyRequest.model_validate(value)
    except pydantic.ValidationError as problem:
        raise bad_request("malformed_request", first_problem(problem)) from problem
    top_k = None if body.top_k is None else min(body.top_k, MAX_TOP_K)
    if body.images is None:
        images = [] if body.image is None else [EncodedImage(decode_text(body.image, "image"))]
        return Upload(images, top_k=top_k, url=body.url)
    if not body.images:
        raise RejectedError(NO_IMAGE)
    if len(body.images) > max_images:
        raise bad_request("too_many_images", f"images: more than {max_images}, the limit of this server")
    images = [EncodedImage(decode_text(text, f"images[{i}]")) for i, text in enumerate(body.images)]
    return Upload(images, is_list=True, top_k=top_k)
