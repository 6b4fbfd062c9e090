"""Admit a request: choose its model and its deadline, and check the limits, before its body is read."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import pydantic
from fastapi import Request, Response

from sopdeploy_service.http.middleware import cancel_on_disconnect
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import DEADLINE, HttpError, Outcome, RejectedError
from sopdeploy_service.inference.service import Images, Service
from sopdeploy_service.observability.request_context import RequestContext

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_DIGITS = 9  # more milliseconds than any timeout; `int` rejects thousands of digits

BAD_TIMEOUT = HttpError("invalid_timeout", 400, "X-Request-Timeout-Ms: must be an integer of at least 1 (ms)")


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


def use_model(context: RequestContext, model: Model) -> Model:
    """Record *model* as that of a request, for the digest header, the metrics and the access log."""
    context.model_name, context.model_version = model.name, model.version
    return model


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
        """Count a request as one image while its model is loaded or its body parsed.

        Raises `RejectedError` if the queue is full or the block does not end before the deadline.
        """
        with self.service.admitting(self.model):
            try:
                async with asyncio.timeout(self.deadline - time.monotonic()):
                    yield
            except TimeoutError as problem:
                raise RejectedError(DEADLINE) from problem

    async def load_model(self) -> None:
        """Wait until the model is loaded."""
        began = time.monotonic()
        async with self.preparing():
            self.model = await self.service.registry.wait_until_loaded(self.model)
        waited = time.monotonic() - began
        self.service.metrics.stage("load", waited)
        self.context.record_stage("load", waited)

    async def infer(self, images: Images, *, features: bool = False) -> list[Outcome]:
        """Run `Service.infer`; a disconnect of the client cancels it."""
        seconds = time.monotonic() - self.started - self.context.stage_seconds.get("load", 0.0)
        self.service.metrics.stage("receive", seconds)
        self.context.record_stage("receive", seconds)
        work = self.service.infer(self.model, images, self.deadline, self.context, features=features)
        return await cancel_on_disconnect(work, self.request.receive)


@asynccontextmanager
async def admit(
    request: Request, name: str | None = None, version: str | None = None
) -> AsyncIterator[AdmittedRequest]:
    """Admit *request* to the model with *name* and *version*.

    With a memory budget, the request may wait until the model is loaded. Raises `RejectedError` if the
    model does not exist, the deadline cannot be met, or the queue or the rate limit is full.
    """
    started = time.monotonic()
    service = service_of(request)
    context: RequestContext = request.scope["state"]["context"]
    deadline = started + timeout_of(context.headers, service.settings.request_timeout)
    with service.registry.use(name, version) as model:
        use_model(context, model)
        result: Literal["success", "fail"] = "fail"
        try:
            service.check_admission(model, deadline)
            if context.rate_limit is not None:
                context.rate_limit.spend(1, check_only=True)
            admitted = AdmittedRequest(request, service, context, model, started, deadline)
            if not model.is_loaded:
                await admitted.load_model()
            yield admitted
            result = "success"
        finally:
            seconds = time.monotonic() - started
            service.metrics.of(model.name).request(result, seconds, context.stage_seconds)


def timeout_of(headers: Mapping[str, str], longest: float) -> float:
    """Return the timeout of a request in seconds: its `X-Request-Timeout-Ms`, at most *longest*."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest
    digits = given.lstrip("0")
    if not (given.isascii() and given.isdigit()) or not digits:
        raise RejectedError(BAD_TIMEOUT)
    return longest if len(digits) > MAX_TIMEOUT_DIGITS else min(longest, int(digits) / 1000)
