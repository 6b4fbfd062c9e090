"""Admit a request, and read its body under limits of size, time, rate and memory.

The model is chosen before the body is read. A body has to arrive at a rate, however long it
takes, and the deadline of the answer begins at its end. The memory budget counts the bytes of a
body from their arrival until the end of the request. It does not count announced bytes, because
a client could then use up the budget with a header.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar, TypeVarTuple, cast

import orjson
import pydantic
from fastapi import Request, Response
from starlette.types import Receive

from sopdeploy.base.config import describe_problem
from sopdeploy.images.occlusion import IMAGES_PER_MAP
from sopdeploy.images.signatures import FIRST_BYTES
from sopdeploy_service.http.forms import parse_form
from sopdeploy_service.http.middleware import RequestContext
from sopdeploy_service.http.problems import bad_request, body_too_large
from sopdeploy_service.http.strict_json import MAX_QUOTES, decode_text, parse_json
from sopdeploy_service.inference import results
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError
from sopdeploy_service.inference.service import Images, Service, Traffic
from sopdeploy_service.inference.uploads import SMALL_BODY, Body
from sopdeploy_service.origins import client_address

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_DIGITS = 9  # more milliseconds than any timeout; `int` rejects thousands of digits
BAD_TIMEOUT = HttpError(
    "invalid_timeout", 400, "X-Request-Timeout-Ms: must be an integer of at least 1 (ms)"
)

MAX_JSON_BYTES = 16_000_000  # of a JSON body, or of the JSON before binary tensors
# A body may be slower than this rate, in bytes per second, for the seconds of grace. The slowest
# mobile networks (EDGE) are faster.
MIN_BODY_RATE = 10_000
BODY_GRACE_SECONDS = 10.0
# A body that was faster may pause for so long: a phone that changes its network needs some seconds
MAX_CREDIT_SECONDS = 30.0

NO_CODING = {"", "identity", "utf-8", "utf8"}  # some clients name a charset
ENCODED = HttpError(
    "unsupported_encoding", 415, "send the body itself, without a Content-Encoding"
)
SLOW_BODY = HttpError("slow_body", 408, "the body arrives more slowly than this server allows")

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
_Query = TypeVar("_Query", bound=pydantic.BaseModel)


def service_of(request: Request) -> Service:
    """Return the `Service` of the app that handles *request*."""
    service: Service = request.app.state.service
    return service


def find_and_record_model(request: Request, name: str | None, version: str | None) -> Model:
    """Find the model of *request*, or raise `RejectedError`; record it for headers, metrics and log."""
    model = service_of(request).registry.find(name, version)
    context: RequestContext = request.scope["state"]["context"]
    context.model_name = model.name
    context.model_digest = model.version
    return model


def json_response(
    body: pydantic.BaseModel | Mapping[str, object], status: int = 200
) -> Response:
    """Create a JSON response; fields of a pydantic model that are None are omitted."""
    value = body.model_dump(exclude_none=True) if isinstance(body, pydantic.BaseModel) else body
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")


@dataclass(eq=False, slots=True)
class AdmittedRequest:
    """A request of *client*, a key or address, to *model*, which stays loaded.

    *started*, *received* and *deadline* are times of `time.monotonic`. The whole request has
    arrived at *received*, which is *started* until `end_upload`; it is answered within *timeout*
    seconds after that.
    """

    request: Request
    service: Service
    context: RequestContext
    model: Model
    client: str
    body: Body
    started: float
    timeout: float
    received: float
    deadline: float

    def end_upload(self) -> None:
        """Begin the time for the answer."""
        self.received = time.monotonic()
        self.deadline = self.received + self.timeout

    async def parse(
        self, parse_body: Callable[[*_Values], _Value], *values: *_Values
    ) -> _Value:
        """Call *parse_body* with *values* in one of the threads that parse.

        Meanwhile, the request counts as an image. Raises `RejectedError` if the queue is full, or
        if the deadline passes.
        """
        self.service.check_queue(self.model, 1, self.deadline)
        self.service.admitted += 1

        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(
                    self.service.parsers, parse_body, *values
                )
        except TimeoutError as problem:
            raise RejectedError(results.DEADLINE) from problem
        finally:
            self.service.admitted -= 1

    async def infer(
        self,
        images: Images,
        *,
        features: bool = False,
        traffic: Traffic | None = None,
        explain: bool = False,
    ) -> list[Outcome]:
        """Run `Service.infer`, or with *explain* `Service.explain`; return the outcome of each image.

        A disconnect of the client cancels it. With *explain*, an image counts as
        `IMAGES_PER_MAP` images. Raises `RejectedError` if these exceed `max_images`, the queue
        is full or the rate limit is exceeded, and what `Service.infer` raises.
        """
        # Count the images, also against the rate of the key.
        context = self.context
        service = self.service
        num_images = len(images) * (IMAGES_PER_MAP if explain else 1)
        # Without *explain*, the parser has checked the number.
        if explain and num_images > service.settings.max_images:
            message = f"with explain=true, an image counts as {IMAGES_PER_MAP}; send fewer, or omit explain"
            raise RejectedError(HttpError("too_many_explained", 422, message))

        service.check_queue(self.model, num_images, self.deadline)
        if context.rate_limit is not None:
            # If the key has too few tokens, it pays for the bytes that were read.
            context.rate_limit.spend(num_images, work=context.bytes // SMALL_BODY)
        context.num_images += num_images

        stages = context.stage_seconds
        stages["receive"] = time.monotonic() - self.started  # all that came before

        # Run them, unless the client leaves.
        client = self.client
        if explain:
            work = service.explain(self.model, images, self.deadline, client)
        else:
            work = service.infer(
                self.model,
                images,
                self.deadline,
                client=client,
                features=features,
                traffic=traffic,
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

    Raises `RejectedError` if the header of the timeout is invalid, the model does not exist or
    cannot run, the deadline cannot be met, or the queue or the rate limit is full. After the
    model is found, a refusal here or in the block costs the key one token, and another per
    `SMALL_BODY` bytes read, unless the client should send the request again or the tokens of its
    images are spent already.
    """
    # This deadline holds until the body has arrived, which begins the time for the answer.
    started = time.monotonic()
    service = service_of(request)
    context: RequestContext = request.scope["state"]["context"]
    timeout = timeout_of(context.headers, service.settings.request_timeout)
    deadline = started + timeout

    proxies = service.settings.trusted_proxies
    client = context.key_name or client_address(context.headers, context.peer, proxies)
    model = find_and_record_model(request, name, version)

    # Refuse before the body is read.
    try:
        service.check_admission(model, deadline)
        if context.rate_limit is not None:  # `infer` takes the tokens of the images
            context.rate_limit.spend(1, check_only=True)

        with service.registry.use(model), service.uploads.open() as body:
            admitted = AdmittedRequest(
                request=request,
                service=service,
                context=context,
                model=model,
                client=client,
                body=body,
                started=started,
                timeout=timeout,
                received=started,  # until `end_upload`
                deadline=deadline,
            )
            yield admitted
    except RejectedError as error:
        is_own_fault = error.reason.retry_after is None  # else the client should send it again
        # A request with images has spent their tokens already.
        if context.rate_limit is not None and is_own_fault and not context.num_images:
            context.rate_limit.charge(1 + context.bytes // SMALL_BODY)
        raise
    finally:
        # The other stages are counted per image and batch.
        if "receive" in context.stage_seconds:
            service.metrics.observe_stage("receive", context.stage_seconds["receive"])


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
    """The images of one request; *is_list* selects a list as response, *texts* are fields of a form."""

    images: list[bytes]
    is_list: bool = False
    texts: Mapping[str, str] = MappingProxyType({})

    def complete(self, query: _Query, model: Model) -> _Query:
        """Add the text fields that are parameters to *query*, which wins; others are left out.

        Raises `RejectedError` if one is invalid, or names another model than *model*, which was
        chosen before the form was read.
        """
        known = {
            name: self.texts[name]
            for name in type(query).model_fields
            if name in self.texts and name not in query.model_fields_set
        }

        # A form cannot change the model that its address has chosen.
        for name, chosen in (("model", model.name), ("version", model.version)):
            if known.get(name, chosen) != chosen:
                message = (
                    f"{name}: this form goes to {chosen}; choose it in the address, ?{name}="
                )
                raise bad_request("malformed_request", message)

        if not known:
            return query

        try:
            return type(query).model_validate(query.model_dump(exclude_unset=True) | known)
        except pydantic.ValidationError as problem:
            message = describe_problem(problem.errors()[0])
            raise RejectedError(HttpError("invalid_parameter", 422, message)) from problem


async def read_upload(admitted: AdmittedRequest) -> Upload:
    """Read the images of a request: raw, as a form, or in JSON.

    Raises `RejectedError` for errors of the request as a whole; single images may still be
    invalid.
    """
    # JSON, unless a client sends an image file under this type.
    settings = admitted.service.settings
    content_type = admitted.context.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        limit = min(settings.max_body_bytes, MAX_JSON_BYTES)

        body = await read_body(admitted, limit)
        if body.startswith(FIRST_BYTES):  # an image file, which some clients label as JSON
            return Upload([body])
        return await admitted.parse(parse_upload, body, limit, settings.max_images)

    # A form.
    if media_type.startswith("multipart/"):
        if media_type != "multipart/form-data":
            raise RejectedError(NOT_A_FORM)

        body = await read_body(admitted, settings.max_body_bytes)
        if len(body) <= SMALL_BODY:
            form = parse_form(body, content_type, settings.max_images)
        else:  # it would take too long on the event loop
            form = await admitted.parse(parse_form, body, content_type, settings.max_images)
        return Upload(form.images, is_list=len(form.images) > 1, texts=form.texts)

    # An image as it is, unless curl has removed bytes of it.
    body = await read_body(admitted, settings.max_body_bytes)
    # `curl --data` sends this type, and removes zero bytes and line ends, which every image
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
    """Read at most *limit* bytes of the body, and begin the time for the answer.

    Counts the bytes in `service.uploads`. Delays beyond the minimum rate may add up to a grace
    period, which faster pieces restore, up to `MAX_CREDIT_SECONDS`. Raises `RejectedError`: 408
    too slow, 413 too large, 415 compressed, 429 budget full, 499 client disconnected.
    """
    service = admitted.service
    context = admitted.context
    body = admitted.body

    if context.headers.get("content-encoding", "").strip().lower() not in NO_CODING:
        raise RejectedError(ENCODED)
    # A chunked body announces no length.
    announced_bytes = int(context.headers.get("content-length", "0"))

    pieces: list[bytes] = []
    # Seconds by which the body may still fall behind the minimum rate
    grace = BODY_GRACE_SECONDS

    while True:
        # Already before the first byte: a client that waits for `100 Continue` must not send a
        # body in vain.
        service.uploads.check(body, max(0, announced_bytes - context.bytes))

        # Wait for the next piece, as long as the minimum rate allows.
        began = time.monotonic()
        try:
            async with asyncio.timeout(grace):
                message = await admitted.request.receive()
        except TimeoutError as problem:
            raise RejectedError(SLOW_BODY) from problem

        if message["type"] == "http.disconnect":
            raise RejectedError(results.CLIENT_GONE)

        piece = message.get("body", b"")
        # A negative delay says that the piece came sooner.
        delay = time.monotonic() - began - len(piece) / MIN_BODY_RATE
        grace = min(MAX_CREDIT_SECONDS, grace - delay)

        # Count the piece, within the limits of all bodies and of this one.
        service.uploads.add(body, len(piece))
        context.bytes += len(piece)
        if context.bytes > limit:
            raise body_too_large(context.headers, limit)

        if piece:
            pieces.append(piece)

        if not message.get("more_body", False):
            admitted.end_upload()
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
