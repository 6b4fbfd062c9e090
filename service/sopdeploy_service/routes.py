"""The endpoints: each takes a request apart, calls the service and puts the answer together."""

import asyncio
import time
from collections.abc import Coroutine
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive

from sopdeploy_service.answer import answer
from sopdeploy_service.card import Card, read_card
from sopdeploy_service.open_inference import largest_batch
from sopdeploy_service.outcome import CLIENT_GONE, Outcome, Refusal
from sopdeploy_service.problems import RefusedError, json_response
from sopdeploy_service.schema import PROBLEM_JSON, Classes, Failed, Health, Info, Problem, Results
from sopdeploy_service.service import Service
from sopdeploy_service.timing import Stages
from sopdeploy_service.upload import read_upload

Value = TypeVar("Value")

router = APIRouter()

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "schema": {
        "type": "object",
        "properties": {"image": {"type": "array", "items": BINARY["schema"]}},
        "required": ["image"],
    }
}
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": BINARY, "multipart/form-data": FORM},
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {PROBLEM_JSON: {}}}
    for status in (400, 408, 413, 415, 422, 429, 500, 503, 504)
}


@router.post(
    "/v1/classify",
    summary="Classify one image or several",
    responses={200: {"model": Classes | Results}, **ERRORS},
    openapi_extra=REQUEST_BODY,
)
async def classify(
    request: Request, top_k: Annotated[int | None, Query(ge=1, le=1_000_000)] = None
) -> Response:
    """Take an image as the body, or 1..n in a form (fields `image`), and give its classes.

    One image gives `{"classes": [...]}` or its error. Several give `{"results": [...]}` with status
    200, in order, each `{"classes": [...]}` or `{"error": {...}}`; only what concerns the whole
    request (queue full, deadline, a damaged form) fails it as a whole.
    """
    service = service_of(request)
    started = time.monotonic()
    deadline = started + service.settings.deadline_seconds
    stages = Stages()
    unless_refused(service.refusal())
    upload = await read_upload(request, service.settings, deadline)
    received = time.monotonic()
    service.metrics.stage("receive", received - started)
    stages.note("receive", received - started)
    work = service.classify(upload.images, deadline, stages)
    outcomes = unless_refused(await unless_gone(work, request.receive))
    top_k = top_k or service.settings.top_k
    headers = {"Server-Timing": stages.header()}
    if not upload.several:
        outcome = unless_refused(outcomes[0])
        return json_response(answer(outcome.logits, service.labels, top_k, outcome.warnings), headers=headers)
    results = tuple(result(service, outcome, top_k) for outcome in outcomes)
    return json_response(Results(results=results), headers=headers)


@router.get("/livez", summary="Is the process worth keeping?", response_model=Health)
async def livez(request: Request) -> Response:
    """Give 200 unless the engine is dead; then the process should be restarted."""
    state = service_of(request).state
    return json_response(Health(status=state), status=503 if state == "engine_dead" else 200)


@router.get("/readyz", summary="Should it get requests now?", response_model=Health)
async def readyz(request: Request) -> Response:
    """Give 200 while images are answered; 503 while draining and after the engine's death.

    The probes of the bundle were replayed before this server began to listen.
    """
    state = service_of(request).state
    return json_response(Health(status=state), status=200 if state == "ok" else 503)


@router.get("/metrics", summary="For Prometheus", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Give the metrics of this server."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/info", summary="Which network answers here?", response_model=Info)
async def info(request: Request) -> Response:
    """Give the facts of the bundle and of what it runs on."""
    service = service_of(request)
    bundle, runtime = service.inference.bundle, service.inference.runtime
    manifest = bundle.manifest
    return json_response(
        Info(
            bundle=bundle.name,
            id=manifest.id,
            model=manifest.model,
            labels=len(bundle.labels),
            precision=manifest.precision,
            preprocess=manifest.preprocess,
            runtime=runtime.name,
            device=runtime.device,
            largest_batch=largest_batch(runtime, service.settings),
            versions={**manifest.versions, "server": version("sopdeploy")},
        )
    )


@router.get("/v1/card", summary="What is this network, and what was proved?", response_model=Card)
def card(request: Request) -> Response:
    """Give the model card and the certificate of the bundle in short."""
    return json_response(read_card(service_of(request).inference.bundle))


def service_of(request: Request) -> Service:
    """Return the service behind the app that got *request*."""
    service: Service = request.app.state.service
    return service


def result(service: Service, outcome: Outcome, top_k: int) -> Classes | Failed:
    """Return the place of one image among the results of several."""
    if isinstance(outcome, Refusal):
        service.metrics.rejected(outcome.code)
        return Failed(error=Problem.of(outcome))
    return answer(outcome.logits, service.labels, top_k, outcome.warnings)


def unless_refused(value: Value | Refusal) -> Value:
    """Return *value*; raises `RefusedError` where it is a refusal."""
    if isinstance(value, Refusal):
        raise RefusedError(value)
    return value


async def unless_gone(work: Coroutine[Any, Any, Value], receive: Receive) -> Value:
    """Return what *work* returns; cancel it and raise `RefusedError` when the client leaves before."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RefusedError(CLIENT_GONE)
    finally:
        leaving.cancel()
        task.cancel()


async def left(receive: Receive) -> None:
    """Return when the client has closed its connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
