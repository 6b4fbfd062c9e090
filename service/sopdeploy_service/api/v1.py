"""`POST /v1/classify` and `/v1/embed`: read the images of a request, run them and format the outputs."""

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from sopdeploy.bundle.manifest import EMBEDDING, GATES
from sopdeploy.http_api import Classes, ClassifyQuery, EmbedQuery, EncodedEmbedding
from sopdeploy_service.api.admission import AdmittedRequest, admit, json_response
from sopdeploy_service.api.schema import ClassifyRequest, Embeddings, Results
from sopdeploy_service.api.upload import Upload, read_upload
from sopdeploy_service.http.problems import bad_request, describe_error, problem_responses
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import (
    FEW_CLASSES,
    HttpError,
    Outcome,
    Prediction,
    RejectedError,
    format_prediction,
    rank_classes,
)

router = APIRouter()

BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "properties": {"image": {"type": "array", "items": BINARY}}, "required": ["image"]}
BODY = {  # read by `read_upload`, within the limits of the settings
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": BINARY},
            "multipart/form-data": {"schema": FORM},
            "application/json": {"schema": ClassifyRequest.model_json_schema()},
        },
    }
}
STATUSES = (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)


@router.post(
    "/v1/classify",
    summary="Classify one image or several",
    response_model=Classes | Results,
    responses=problem_responses(*STATUSES),
    openapi_extra=BODY,
)
async def classify(request: Request, query: Annotated[ClassifyQuery, Query()]) -> Response:
    """Classify the image in the body, or 1..n images in a form (fields `image`) or in JSON.

    One image gives `{"classes": [...]}` or its error. Several give `{"results": [...]}` with status 200, in
    order, each `{"classes": [...]}` or `{"error": {...}}`; only errors of the whole request (queue full,
    deadline, malformed form) fail it as a whole. A multi-label network lists all classes above their
    threshold, at most `top_k` if the request sets it. `warnings` next to the classes name changes made while
    decoding, such as `exif_rotated`. Bundles with a rejection threshold add `known` and `score`.
    """
    async with admit(request, query.model, query.version) as admitted:
        _check_query(query, admitted.model)
        upload = await read_upload(admitted)
        service, chosen = admitted.service, admitted.model
        top_k, ranked_in_batch = query.top_k or upload.top_k, 0
        if chosen.thresholds is None:
            top_k = top_k or service.settings.top_k
            # Only few: the worker ranks as many for the images of other requests in the batch.
            ranked_in_batch = top_k if top_k <= FEW_CLASSES else 0
        admitted.context.may_keep = True
        outcomes = await admitted.infer(upload.images, top_k=ranked_in_batch)

    def format_classes(outcome: Prediction) -> dict[str, Any]:
        result = _format_result(outcome, chosen, query, top_k)
        if result.get("known") is False:
            service.metrics.unknown_images.labels(chosen.name).inc()
        return result

    return _respond(admitted, upload, outcomes, format_classes)


@router.post(
    "/v1/embed",
    summary="Compute the features in front of the classifier",
    response_model=EncodedEmbedding | Embeddings,
    responses=problem_responses(*STATUSES),
    openapi_extra=BODY,
)
async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
    """Compute the embedding of the image in the body, or of 1..n images in a form or in JSON.

    Requests, limits and errors are those of `/v1/classify`; each image has `embedding` instead of `classes`.
    The bundle must have been exported with `--with-features`.
    """
    async with admit(request, query.model, query.version) as admitted:
        if not any(output.name == EMBEDDING for output in admitted.model.bundle.manifest.outputs):
            message = f"{admitted.model.name}: has no features; export it with --with-features"
            raise bad_request("no_features", message)
        upload = await read_upload(admitted)
        outcomes = await admitted.infer(upload.images, features=True)

    def format_embedding(outcome: Prediction) -> dict[str, Any]:
        vector = outcome.outputs[EMBEDDING]
        if query.encoding_format == "float":
            return {"embedding": vector.tolist(), "warnings": outcome.warnings}
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return {"embedding": encoded, "warnings": outcome.warnings}

    return _respond(admitted, upload, outcomes, format_embedding)


def _respond(
    admitted: AdmittedRequest,
    upload: Upload,
    outcomes: Sequence[Outcome],
    format_result: Callable[[Prediction], dict[str, Any]],
) -> Response:
    """Create the response with the *outcomes* of *upload*; an image of its own that is invalid raises."""
    if not upload.is_list and isinstance(outcomes[0], HttpError):
        raise RejectedError(outcomes[0])
    results: list[dict[str, Any]] = []
    for outcome in outcomes:
        if isinstance(outcome, HttpError):
            admitted.service.metrics.rejected.labels(outcome.code).inc()
            results.append({"error": describe_error(outcome).model_dump()})
        else:
            results.append(format_result(outcome))
    body = {"results": results} if upload.is_list else results[0]
    return json_response(body, headers={"Server-Timing": admitted.context.server_timing()})


def _check_query(query: ClassifyQuery, chosen: Model) -> None:
    """Raise `RejectedError` if *chosen* cannot do what *query* requests."""
    if query.gates and not any(output.name == GATES for output in chosen.bundle.manifest.outputs):
        raise bad_request("no_gates", f"{chosen.name}: has no gate; omit gates=true")
    if query.threshold is not None and chosen.thresholds is None:
        raise bad_request("no_thresholds", f"{chosen.name}: predicts one class per image; omit threshold")


def _format_result(
    outcome: Prediction, chosen: Model, query: ClassifyQuery, top_k: int | None
) -> dict[str, Any]:
    """Build the JSON object of one prediction, with the gates if *query* requests them."""
    logits = outcome.outputs[chosen.bundle.manifest.outputs[0].name]
    thresholds = chosen.thresholds
    if query.threshold is not None:
        thresholds = (query.threshold,) * len(chosen.labels)
    ranked = outcome.ranked or rank_classes(logits[None], top_k, thresholds)[0]
    weights = outcome.outputs[GATES] if query.gates else None
    recognized = None if chosen.rejection is None else chosen.rejection.recognize(logits)
    return format_prediction(
        ranked,
        chosen.labels,
        warnings=outcome.warnings,
        gates=weights,
        recognized=recognized,
    )
