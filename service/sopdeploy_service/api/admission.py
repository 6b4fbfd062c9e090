"""Admit a request, and read its body under limits of size, time, rate and memory.

The model and the deadline are chosen before the body is read. The memory budget counts the
bytes of a body from their arrival until the end of the request. It does not count announced
bytes, because a client could then use up the budget with a header.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, TypeVarTuple, cast

import orjson
import pydantic
from fastapi import Request, Response
from starlette.types import Receive

from sopdeploy.images.formats import too_large_error
from sopdeploy.images.occlusion import IMAGES_PER_MAP
from sopdeploy.images.signatures import FIRST_BYTES
from sopdeploy_service.http.forms import parse_form
from sopdeploy_service.http.middleware import RequestContext
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import MAX_QUOTES, decode_text, parse_json
from sopdeploy_service.inference import results
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError
from sopdeploy_service.inference.service import Images, Service
from sopdeploy_service.origins import client_address
from sopdeploy_service.settings import LARGE_BODY_SHARE

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_DIGITS = 9  # more milliseconds than any timeout; `int` rejects thousands of digits
BAD_TIMEOUT = HttpError(
    "invalid_timeout", 400, "X-Request-Timeout-Ms: must be an integer of at least 1 (ms)"
)

# most images are smaller; the last eighth of the budget is reserved for such bodies
SMALL_BODY = 1_000_000

ENCODED = HttpError(
    "unsupported_encoding", 415, "send the body itself, without a Content-Encoding"
)
SLOW_BODY = HttpError("slow_body", 408, "the body arrives more slowly than this server allows")
LATE_BODY = HttpError("slow_body", 408, "the body did not arrive before the deadline")
UPLOADS_FULL = HttpError(
    "uploads_full", 429, "too many bytes are being uploaded; retry later", 2
)

_NO_IMAGE = HttpError("no_image", 422, "the list `images` is empty")
STRIPPED = HttpError(
    "stripped_body",
    400,
    "curl's --data and -d remove bytes from files; send the image with --data-binary @FILE",
)
CURL_REMOVES = re.compile(rb"[\0\r\n]")
NOT_A_FORM = HttpError(
    "unsupported_multipart", 415, "send the image itself or multipart/form-data"
)

_Value = TypeVar("_Value")
_Values = TypeVarTuple("_Values")


def service_of(request: Request) -> Service:
    """Return the `Service` of the app that handles *request*."""
    service: Service = request.app.state.service
    return service


def find_and_record_model(request: Request, name: str | None, version: str | None) -> Model:
    """Find the model of *request*, or raise `RejectedError`; record it for headers, metrics and log."""
    model = service_of(request).registry.find(name, version)
    context: RequestContext = request.scope["state"]["context"]
    context.model_name, context.model_digest = model.name, model.version
    return model


def json_response(
    body: pydantic.BaseModel | Mapping[str, object], status: int = 200
) -> Response:
    """Create a JSON response; fields of a pydantic model that are None are omitted."""
    value = body.model_dump(exclude_none=True) if isinstance(body, pydantic.BaseModel) else body
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")


@dataclass(eq=False, slots=True)
class AdmittedRequest:
    """A request to *model*, which stays loaded; *started* and *deadline* are times of `time.monotonic`."""

    request: Request
    service: Service
    context: RequestContext
    model: Model
    started: float
    deadline: float

    @asynccontextmanager
    async def preparing(self) -> AsyncIterator[None]:
        """Count a request as an image while its model loads or its body is parsed.

        Raises `RejectedError` if the queue is full, or if the deadline passes.
        """
        self.service.check_queue(self.model, 1)
        self.service.admitted += 1
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                yield
        except TimeoutError as problem:
            raise RejectedError(results.DEADLINE) from problem
        finally:
            self.service.admitted -= 1

    async def parse(
        self, parse_body: Callable[[*_Values], _Value], *values: *_Values
    ) -> _Value:
        """Call *parse_body* with *values* in one of the threads for JSON."""
        async with self.preparing():
            return await asyncio.get_running_loop().run_in_executor(
                self.service.parsers, parse_body, *values
            )

    async def infer(
        self,
        images: Images,
        *,
        features: bool = False,
        may_keep: bool = False,
        explain: bool = False,
    ) -> list[Outcome]:
        """Run `Service.infer`, or with *explain* `Service.explain`; return the outcome of each image.

        A disconnect of the client cancels it. With *explain*, an image counts as
        `IMAGES_PER_MAP` images. Raises `RejectedError` if these exceed `max_images`, the queue
        is full or the rate limit is exceeded, and what `Service.infer` raises.
        """
        context, service = self.context, self.service
        num_images = len(images) * (IMAGES_PER_MAP if explain else 1)
        if (
            explain and num_images > service.settings.max_images
        ):  # the parser has checked len(images)
            message = f"with explain=true, an image counts as {IMAGES_PER_MAP}; send fewer, or omit explain"
            raise RejectedError(HttpError("too_many_explained", 422, message))
        service.check_queue(self.model, num_images)
        if context.rate_limit is not None:
            context.rate_limit.spend(num_images, work=context.bytes // SMALL_BODY)
        context.num_images += num_images
        stages = context.stage_seconds
        stages["receive"] = (
            time.monotonic() - self.started - stages.get("load", 0.0)
        )  # all but the load
        client = context.key_name or client_address(
            context.headers, context.peer, service.settings.trusted_proxies
        )
        if explain:
            work = service.explain(self.model, images, self.deadline, client)
        else:
            work = service.infer(
                self.model,
                images,
                self.deadline,
                client=client,
                features=features,
                may_keep=may_keep,
            )
        outcomes = await cancel_on_disconnect(work, self.request.receive)
        for outcome in outcomes:  # the longest time of each stage counts
            if isinstance(outcome, Prediction):
                for stage, seconds in outcome.stage_seconds.items():
                    stages[stage] = max(seconds, stages.get(stage, 0.0))
        return outcomes


@asynccontextmanager
async def admit(
    request: Request, name: str | None = None, version: str | None = None
) -> AsyncIterator[AdmittedRequest]:
    """Admit *request* to the model with *name* and *version*.

    With a memory budget, the request may wait until the model is loaded. Raises `RejectedError`
    if the model does not exist, the deadline cannot be met, or the queue or the rate limit is
    full. After the model is found, a refusal here or in the block costs the key one token, and
    another per `SMALL_BODY` bytes read, unless the client should send the request again or the
    tokens of its images are spent already.
    """
    started = time.monotonic()
    service = service_of(request)
    context: RequestContext = request.scope["state"]["context"]
    deadline = started + timeout_of(context.headers, service.settings.request_timeout)
    model = find_and_record_model(request, name, version)
    result: Literal["success", "fail"] = "fail"
    try:
        service.check_admission(model, deadline)
        if context.rate_limit is not None:
            context.rate_limit.spend(1, check_only=True)  # before the body is read
        with service.registry.use(model):
            admitted = AdmittedRequest(request, service, context, model, started, deadline)
            if not model.is_loaded:
                began = time.monotonic()
                async with admitted.preparing():
                    admitted.model = await service.registry.wait_until_loaded(model)
                context.stage_seconds["load"] = time.monotonic() - began
            yield admitted
        result = "success"
    except RejectedError as error:
        is_own_fault = error.reason.retry_after is None  # else the client should send it again
        if (
            context.rate_limit is not None and is_own_fault and not context.num_images
        ):  # these are paid
            context.rate_limit.charge(1 + context.bytes // SMALL_BODY)
        raise
    finally:
        service.metrics.count_inference(
            model.name, result, time.monotonic() - started, context.stage_seconds
        )


def timeout_of(headers: Mapping[str, str], longest: float) -> float:
    """Return the timeout in *headers* in seconds, at most *longest*, its default; raises `RejectedError`."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return longest
    is_number = text.isascii() and text.isdigit()
    digits = text.lstrip("0")
    is_zero = not digits
    if not is_number or is_zero:
        raise RejectedError(BAD_TIMEOUT)
    return longest if len(digits) > MAX_TIMEOUT_DIGITS else min(longest, int(digits) / 1000)


async def cancel_on_disconnect(work: Coroutine[Any, Any, _Value], receive: Receive) -> _Value:
    """Return the result of *work*; cancel it and raise `RejectedError` (499) if the client disconnects first.

    The request body must have been read; a message of *receive* other than the disconnect is
    ignored.
    """
    task = cast(asyncio.Task[Any], asyncio.current_task())
    is_client_gone = False

    async def wait_for_disconnect() -> None:
        nonlocal is_client_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_client_gone = True
        task.cancel()

    watcher = asyncio.create_task(wait_for_disconnect())
    try:
        return await work
    except asyncio.CancelledError:
        if is_client_gone and not task.uncancel():  # nobody else has cancelled the task, too
            raise RejectedError(results.CLIENT_GONE) from None
        raise
    finally:
        watcher.cancel()


Texts = Annotated[list[str], pydantic.Field(max_length=MAX_QUOTES // 2, fail_fast=True)]


class ClassifyRequest(pydantic.BaseModel):
    """JSON body of `/v1/classify` and `/v1/embed`: either `image` or `images`."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    image: str | None = pydantic.Field(None, description="base64, or a data URI")
    images: Texts | None = pydantic.Field(None, description="base64, or data URIs")

    @pydantic.model_validator(mode="after")
    def _has_images(self) -> "ClassifyRequest":
        if (self.image is None) == (self.images is None):
            raise ValueError("the body must have either `image` or `images`")
        return self


class Upload(NamedTuple):
    """The images of one request; *is_list* selects a list as response."""

    images: list[bytes]
    is_list: bool = False


async def read_upload(admitted: AdmittedRequest) -> Upload:
    """Read the images of a request before its deadline: raw, as a form, or in JSON.

    Raises `RejectedError` for errors of the request as a whole; single images may still be
    invalid.
    """
    settings = admitted.service.settings
    content_type = admitted.context.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        limit = min(settings.max_body_bytes, settings.max_json_bytes)
        body = await read_body(admitted, limit)
        if body.startswith(FIRST_BYTES):  # an image file, which some clients label as JSON
            return Upload([body])
        return await admitted.parse(parse_upload, body, limit, settings.max_images)
    if media_type.startswith("multipart/"):
        if media_type != "multipart/form-data":
            raise RejectedError(NOT_A_FORM)
        body = await read_body(admitted, settings.max_body_bytes)
        if len(body) <= SMALL_BODY:
            images = parse_form(body, content_type, settings.max_images)
        else:  # it would take too long on the event loop
            images = await admitted.parse(parse_form, body, content_type, settings.max_images)
        return Upload(images, is_list=len(images) > 1)
    body = await read_body(admitted, settings.max_body_bytes)
    # curl's --data sends this type, and removes zero bytes and line ends, which every image
    # file has.
    may_be_curl_data = media_type == "application/x-www-form-urlencoded"
    if may_be_curl_data and body and CURL_REMOVES.search(body) is None:
        raise RejectedError(STRIPPED)
    return Upload([body])


def parse_upload(raw: bytes, max_bytes: int, max_images: int) -> Upload:
    """Parse a JSON body, in a thread; raises `RejectedError` unless it is a valid `ClassifyRequest`."""
    body = parse_json(ClassifyRequest, raw, max_bytes)
    if body.image is not None:
        return Upload([decode_text(body.image, "image")])
    if not body.images:
        raise RejectedError(_NO_IMAGE)
    if len(body.images) > max_images:
        raise bad_request(
            "too_many_images", f"images: more than {max_images}, the limit of this server"
        )
    images = [decode_text(text, f"images[{i}]") for i, text in enumerate(body.images)]
    return Upload(images, is_list=True)


async def read_body(admitted: AdmittedRequest, limit: int) -> bytes:
    """Read at most *limit* bytes of the body before the deadline.

    Counts the bytes in `service.upload_bytes`, from which the middleware takes them after the
    answer. Delays beyond the minimum rate may add up to a grace period, which faster pieces
    restore. Raises `RejectedError`: 408 too slow, 413 too large, 415 compressed, 429 budget
    full, 499 client disconnected.
    """
    service, context, settings = admitted.service, admitted.context, admitted.service.settings
    if context.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RejectedError(ENCODED)
    announced = int(context.headers.get("content-length", "0"))  # a chunked body has no length
    pieces: list[bytes] = []
    grace = (
        settings.body_grace_seconds
    )  # seconds by which the body may still fall behind the minimum rate
    while True:
        # Already before the first byte: a client that waits for `100 Continue` must not send a
        # body in vain.
        _check_budget(service, received=context.bytes, more=max(0, announced - context.bytes))
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(grace, admitted.deadline - began)):
                message = await admitted.request.receive()
        except TimeoutError as problem:
            is_late = time.monotonic() >= admitted.deadline
            raise RejectedError(LATE_BODY if is_late else SLOW_BODY) from problem
        if message["type"] == "http.disconnect":
            raise RejectedError(results.CLIENT_GONE)
        piece = message.get("body", b"")
        delay = (
            time.monotonic() - began - len(piece) / settings.min_body_rate
        )  # negative: it came sooner
        grace = min(settings.body_grace_seconds, grace - delay)
        # Other bodies may have grown during the wait, and a chunked one does not announce its
        # length.
        _check_budget(service, received=context.bytes, more=len(piece))
        service.upload_bytes += len(piece)
        context.bytes += len(piece)
        if context.bytes > limit:
            raise RejectedError(HttpError.from_image_error(too_large_error(limit)))
        if piece:
            pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_budget(service: Service, received: int, more: int) -> None:
    """Raise `RejectedError` (429) if a body of *received* bytes may not grow by *more* bytes."""
    budget = service.max_upload_bytes  # for the bodies of all requests together
    if received + more > SMALL_BODY:
        budget = int(budget * LARGE_BODY_SHARE)  # large bodies leave the rest to small ones
    if service.upload_bytes + more > budget:
        raise RejectedError(UPLOADS_FULL)
