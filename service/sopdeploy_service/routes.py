"""`POST /v1/classify`: takes a request apart, calls the service and puts the answer together."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from sopdeploy_service.admission import admit, service_of, unless_gone, unless_refused
from sopdeploy_service.answer import answer
from sopdeploy_service.model import Model
from sopdeploy_service.outcome import Outcome, Refusal
from sopdeploy_service.problems import json_response
from sopdeploy_service.schema import PROBLEM_JSON, Classes, Failed, Problem, Results
from sopdeploy_service.service import Service
from sopdeploy_service.timing import Stages
from sopdeploy_service.upload import read_upload

router = APIRouter()

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "schema": {
        "type": "object",
        "properties": {"image": {"type": "array", "items": BINARY["schema"]}},
        "required": ["image"],
    }
}
JSON = {
    "schema": {
        "type": "object",
        "properties": {
            "image": {"type": "string", "description": "base64, or a data URI"},
            "images": {"type": "array", "items": {"type": "string"}},
            "url": {"type": "string", "description": "where the server allows it"},
            "top_k": {"type": "integer", "minimum": 1},
        },
        "additionalProperties": False,
    }
}
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": BINARY, "multipart/form-data": FORM, "application/json": JSON},
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {PROBLEM_JSON: {}}}
    for status in (400, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)
}


@router.post(
    "/v1/classify",
    summary="Classify one image or several",
    responses={200: {"model": Classes | Results}, **ERRORS},
    openapi_extra=REQUEST_BODY,
)
async def classify(
    request: Request,
    top_k: Annotated[int | None, Query(ge=1, le=1_000_000)] = None,
    model: Annotated[str | None, Query(description="Needed where several models answer.")] = None,
    version: Annotated[str | None, Query(description="A bundle's id; else the current one.")] = None,
) -> Response:
    """Take an image as the body, 1..n in a form (fields `image`) or in JSON, and give its classes.

    One image gives `{"classes": [...]}` or its error. Several give `{"results": [...]}` with status
    200, in order, each `{"classes": [...]}` or `{"error": {...}}`; only what concerns the whole
    request (queue full, deadline, a damaged form) fails it as a whole.
    """
    service = service_of(request)
    started = time.monotonic()
    chosen, deadline = admit(request, model, version)
    stages = Stages()
    upload = await read_upload(request, service.settings, deadline)
    received = time.monotonic()
    service.metrics.stage("receive", received - started)
    stages.note("receive", received - started)
    work = service.classify(chosen, upload.images, deadline, stages)
    outcomes = unless_refused(await unless_gone(work, request.receive))
    top_k = top_k or upload.top_k or service.settings.top_k
    headers = {"Server-Timing": stages.header()}
    if not upload.several:
        logits = unless_refused(outcomes[0]).logits
        return json_response(answer(logits, chosen.labels, top_k), headers=headers)
    results = tuple(result(service, chosen, outcome, top_k) for outcome in outcomes)
    return json_response(Results(results=results), headers=headers)


def result(service: Service, model: Model, outcome: Outcome, top_k: int) -> Classes | Failed:
    """Return the place of one image among the results of several."""
    if isinstance(outcome, Refusal):
        service.metrics.rejected(outcome.code)
        return Failed(error=Problem.of(outcome))
    return answer(outcome.logits, model.labels, top_k)
