"""`POST /v1/classify`: takes a request apart, calls the service and puts the answer together."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute

from sopdeploy_service.api.direct import flag, number, word
from sopdeploy_service.api.schema import Classes, Problem, Results
from sopdeploy_service.api.upload import admit, context_of, read_upload, service_of, unless_rejected
from sopdeploy_service.http.disconnect import cancel_on_disconnect
from sopdeploy_service.http.problems import RejectedError, described, json_response
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import GATES, Prediction, Rejection, format_prediction
from sopdeploy_service.inference.service import Service

# The names and kinds of the parameters of `classify`.
PLAIN = {"top_k": number, "model": word, "version": word, "gates": flag}

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
ERRORS = described(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)


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
    gates: Annotated[
        bool, Query(description="Say which experts decided, where the network has a gate.")
    ] = False,
) -> Response:
    """Take an image as the body, 1..n in a form (fields `image`) or in JSON, and give its classes.

    One image gives `{"classes": [...]}` or its error. Several give `{"results": [...]}` with status
    200, in order, each `{"classes": [...]}` or `{"error": {...}}`; only what concerns the whole
    request (queue full, deadline, a damaged form) fails it as a whole. `warnings` beside the classes name
    what was done to the image, such as `exif_rotated`.
    """
    service = service_of(request)
    started = time.monotonic()
    chosen, deadline = admit(request, model, version)
    if gates and not has_gates(chosen):
        raise RejectedError(no_gates(chosen))
    context = context_of(request)
    with chosen.in_use():  # from its admission on: while a slow body comes, the model may be replaced twice
        upload = await read_upload(request, service, chosen, deadline)
        received = time.monotonic()
        service.metrics.stage("receive", received - started)
        context.record_stage("receive", received - started, received)
        work = service.infer(chosen, upload.images, deadline, context)
        outcomes = unless_rejected(await cancel_on_disconnect(work, request.scope, request.receive))
    top_k = top_k or upload.top_k or service.settings.top_k
    headers = {"Server-Timing": context.server_timing()}
    if not upload.several:
        return json_response(answered(chosen, unless_rejected(outcomes[0]), top_k, gates), headers=headers)
    results = [
        refused(service, outcome)
        if isinstance(outcome, Rejection)
        else answered(chosen, outcome, top_k, gates)
        for outcome in outcomes
    ]
    return json_response({"results": results}, headers=headers)


(route,) = (one for one in router.routes if isinstance(one, APIRoute))


def answered(model: Model, outcome: Prediction, top_k: int, gates: bool) -> dict[str, Any]:
    """Return the answer to one image, with the experts of its gate where *gates* were asked for."""
    weights = outcome.outputs[GATES] if gates else None
    return format_prediction(
        outcome.ranking.top_k(outcome.row, top_k), model.labels, warnings=outcome.warnings, gates=weights
    )


def refused(service: Service, refusal: Rejection) -> dict[str, Any]:
    """Return the place of a bad image among the results of several."""
    service.metrics.rejected(refusal.code)
    return {"error": Problem.of(refusal).model_dump()}


def has_gates(model: Model) -> bool:
    """Say whether *model* tells which experts it chose."""
    return any(output.name == GATES for output in model.bundle.manifest.outputs)


def no_gates(model: Model) -> Rejection:
    """Return the refusal of a request for the gates of a *model* without any."""
    return Rejection("no_gates", 400, f"{model.name}: has no gate; leave gates=true away")
