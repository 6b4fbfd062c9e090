"""`POST /v1/classify`: read the images of a request, run them and format the predictions."""

import time
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from sopdeploy_service.api.schema import Classes, ClassifyQuery, ClassifyRequest, Results
from sopdeploy_service.api.upload import (
    admit,
    json_response,
    prediction_of,
    read_upload,
    service_of,
)
from sopdeploy_service.http.middleware import cancel_on_disconnect
from sopdeploy_service.http.problems import Problem, problem_responses
from sopdeploy_service.inference.explain import check_explainable, format_class_map
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import (
    GATES,
    Prediction,
    RejectedError,
    Rejection,
    format_prediction,
    present_classes,
)


class DirectRoute(APIRoute):
    """Route that calls its endpoint directly, without FastAPI's validation of parameters and responses.

    A request takes 0.52 ms of CPU time instead of 0.63 (`benchmarks/request_cpu.py`).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Use the endpoint itself instead of FastAPI's wrapper."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


router = APIRouter(route_class=DirectRoute)

BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "properties": {"image": {"type": "array", "items": BINARY}}, "required": ["image"]}
PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": schema}
    for name, schema in ClassifyQuery.model_json_schema()["properties"].items()
]
BODIES = {
    "image/*": {"schema": BINARY},
    "multipart/form-data": {"schema": FORM},
    "application/json": {"schema": ClassifyRequest.model_json_schema()},
}


@router.post(
    "/v1/classify",
    summary="Classify one image or several",
    responses={
        200: {"model": Classes | Results},
        **problem_responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={"parameters": PARAMETERS, "requestBody": {"required": True, "content": BODIES}},
)
async def classify(request: Request) -> Response:
    """Classify the image in the body, or 1..n images in a form (fields `image`) or in JSON.

    One image gives `{"classes": [...]}` or its error. Several give `{"results": [...]}` with status 200, in
    order, each `{"classes": [...]}` or `{"error": {...}}`; only errors of the whole request (queue full,
    deadline, malformed form) fail it as a whole. A multi-label network lists all classes above their
    threshold, at most `top_k` if the request sets it. `warnings` next to the classes name changes made while
    decoding, such as `exif_rotated`. Bundles with a rejection threshold add `known` and `score`.
    """
    service, context = service_of(request), request.state.context
    started = time.monotonic()
    try:  # much faster than parameters of the function, which FastAPI validates one by one
        query = ClassifyQuery.model_validate(dict(request.query_params))
    except pydantic.ValidationError as problem:
        errors = [{**error, "loc": ("query", *error["loc"])} for error in problem.errors()]
        raise RequestValidationError(errors) from problem
    chosen, deadline = admit(request, query.model, query.version)
    if query.gates and not any(output.name == GATES for output in chosen.bundle.manifest.outputs):
        raise RejectedError(Rejection("no_gates", 400, f"{chosen.name}: has no gate; omit gates=true"))
    if query.threshold is not None and chosen.thresholds is None:
        message = f"{chosen.name}: predicts one class per image; omit threshold"
        raise RejectedError(Rejection("no_thresholds", 400, message))
    explained = query.explain or query.explain_label is not None
    if explained:
        names = (chosen.name, chosen.loaded.class_maps, chosen.labels)
        check_explainable(*names, query.explain_label)
    with chosen.in_use():  # while the body arrives, the model may be replaced
        upload = await read_upload(request, service, chosen, deadline)
        received = time.monotonic()
        service.metrics.stage("receive", received - started)
        context.record_stage("receive", received - started, received)
        work = service.infer(chosen, upload.images, deadline, context, features=explained)
        outcomes = await cancel_on_disconnect(work, request.receive)
    if not upload.is_list:
        prediction_of(outcomes[0])
    top_k = query.top_k or upload.top_k or (service.settings.top_k if chosen.thresholds is None else None)
    results: list[dict[str, Any]] = []
    for outcome in outcomes:
        if isinstance(outcome, Rejection):
            service.metrics.rejected.labels(outcome.code).inc()
            results.append({"error": Problem.of(outcome).model_dump()})
            continue
        results.append(_format_result(outcome, chosen, query, top_k))
        if results[-1].get("known") is False:
            service.metrics.unknown_images.labels(chosen.name).inc()
    body = {"results": results} if upload.is_list else results[0]
    return json_response(body, headers={"Server-Timing": context.server_timing()})


def _format_result(
    outcome: Prediction, chosen: Model, query: ClassifyQuery, top_k: int | None
) -> dict[str, Any]:
    """Build the JSON object of one prediction, with the gates and the class map that *query* requests."""
    logits = outcome.outputs[chosen.bundle.manifest.outputs[0].name]
    if chosen.thresholds is None:
        ranked = outcome.ranking.top_k(outcome.row, top_k or len(chosen.labels))
    else:
        same = None if query.threshold is None else [query.threshold] * len(chosen.labels)
        ranked = present_classes(logits, same or chosen.thresholds, top_k)
    weights = outcome.outputs[GATES] if query.gates else None
    recognized = None if chosen.rejection is None else chosen.rejection.recognize(logits)
    result = format_prediction(
        ranked, chosen.labels, warnings=outcome.warnings, gates=weights, recognized=recognized
    )
    label, layer = query.explain_label, chosen.loaded.class_maps
    if layer is not None and (query.explain or label is not None):
        index = int(logits.argmax()) if label is None else chosen.labels.index(label)
        rules = chosen.bundle.manifest.preprocess
        result["class_map"] = format_class_map(outcome, layer, index, chosen.labels, rules)
    return result
