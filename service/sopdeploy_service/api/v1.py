"""`POST /v1/classify` and `/v1/embed`: read the images of a request, run them and format the outputs."""

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

import orjson
from fastapi import APIRouter, Query, Request, Response

from sopdeploy.base.config import StrictModel
from sopdeploy.base.names import class_problem
from sopdeploy.bundle.http_api import (
    Classes,
    ClassifyQuery,
    EmbedQuery,
    EncodedEmbedding,
    Problem,
    name_classes,
)
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy_service.api.admission import (
    AdmittedRequest,
    ClassifyRequest,
    Upload,
    admit,
    read_upload,
)
from sopdeploy_service.http.problems import bad_request, describe_error, describe_statuses
from sopdeploy_service.http.query_route import QueryRoute
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError
from sopdeploy_service.inference.service import Traffic

STATUSES = (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)
router = APIRouter(
    tags=["Images"], responses=describe_statuses(*STATUSES), route_class=QueryRoute
)

BINARY = {"type": "string", "format": "binary"}
FORM = {
    "type": "object",
    "properties": {"image": {"type": "array", "items": BINARY}},
    "required": ["image"],
}
# Read by `read_upload`, within the limits of the settings
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": BINARY},
            "application/octet-stream": {"schema": BINARY},
            "multipart/form-data": {"schema": FORM},
            "application/json": {"schema": ClassifyRequest.model_json_schema()},
        },
    }
}


class Failed(StrictModel):
    """The error of one image among several."""

    error: Problem


class Results(StrictModel):
    """Results of several images, in the order of the request."""

    results: tuple[Classes | Failed, ...]


class Embeddings(StrictModel):
    """Embeddings of several images, in the order of the request."""

    results: tuple[EncodedEmbedding | Failed, ...]


Fields: TypeAlias = dict[str, object]  # of a response model


@router.post(
    "/v1/classify",
    summary="Classify one image or several",
    response_model=Classes | Results,
    openapi_extra=BODY,
)
async def classify(request: Request, query: Annotated[ClassifyQuery, Query()]) -> Response:
    """Classify the image in the body, or 1..n images in a form (its files) or in JSON. Text
    fields of a form with the name of a parameter count like it, others do not.

    One image gives `{"classes": [...]}` or its error. Several, and the list `images` in JSON,
    give `{"results": [...]}` with status 200, in order, each `{"classes": [...]}` or
    `{"error": {...}}`; only errors of the whole request (queue full, malformed form or base64)
    fail it as a whole. A multi-label
    network lists all classes above their threshold, at most `top_k` if the request or the
    setting limits them. `warnings` next to the classes name changes made while decoding, such
    as `exif_rotated`. Bundles with a rejection threshold add `known` and `score`.
    `explain=true` adds the `explanation` of the first class; an image then counts as 50.
    `reported`, after a wrong answer, keeps the image for a label; a server that keeps no images
    refuses it.
    """
    # Read the images; the fields of a form are parameters, too.
    async with admit(request, query.model, query.version) as admitted:
        model = admitted.model
        check_query(admitted, query)  # before the body is read
        upload = await read_upload(admitted)

        if upload.texts:
            query = upload.complete(query, model)
            check_query(admitted, query)

        # Run them.
        top_k = query.top_k or model.top_k
        outcomes = await admitted.infer(
            upload.images, traffic=Traffic(query.reported), explain=query.explain
        )

        def format_classes(prediction: Prediction) -> Fields:
            logits = prediction.outputs[model.logits_name]

            answer = model.decision.answer(logits, top_k, query.threshold, prediction.occluded)
            if query.reported is None:  # a reported image was sent, and counted, before
                admitted.service.count_answer(model, answer)
            return name_classes(answer, model.labels, prediction.warnings)

        return _respond(admitted, upload, outcomes, format_classes)


def check_query(admitted: AdmittedRequest, query: ClassifyQuery) -> None:
    """Raise `RejectedError` for parameters that do not apply to the network or the server."""
    model = admitted.model
    if query.threshold is not None and not model.decision.is_multi_label:
        message = f"{model.name}: predicts one class per image; omit threshold"
        raise bad_request("no_thresholds", message)

    if query.reported is not None:
        check_report(admitted, query)


def check_report(admitted: AdmittedRequest, query: ClassifyQuery) -> None:
    """Raise `RejectedError` unless the wrong answer that *query* reports can be kept.

    The server must keep images, and *query* must ask for no explanation. Its `reported` is the
    class that the person suggests, which can be a new one, or empty.
    """
    if admitted.service.keep is None:
        raise bad_request(
            "not_keeping", "this server keeps no images; start it with keep, or omit reported"
        )

    if query.explain:
        raise bad_request(
            "malformed_request", "reported: cannot be combined with explain; omit explain"
        )

    if query.reported and (problem := class_problem(query.reported)):
        message = f"reported: {problem}; write the name of a class, or leave it empty"
        raise bad_request("malformed_request", message)


@router.post(
    "/v1/embed",
    summary="Compute the features in front of the classifier",
    response_model=EncodedEmbedding | Embeddings,
    openapi_extra=BODY,
)
async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
    """Compute the embedding of the image in the body, or of 1..n images in a form or in JSON.

    Requests, limits and errors are those of `/v1/classify`; each image has `embedding` instead
    of `classes`. The bundle must have been exported with `--with-features`.
    """
    # Refuse a bundle without an embedding before the body is read.
    async with admit(request, query.model, query.version) as admitted:
        if not any(
            output.name == EMBEDDING for output in admitted.model.bundle.manifest.outputs
        ):
            message = f"{admitted.model.name}: has no features; export it with --with-features"
            raise bad_request("no_features", message)

        upload = await read_upload(admitted)
        query = upload.complete(query, admitted.model)  # fields of a form are parameters, too
        outcomes = await admitted.infer(upload.images, features=True)

        def format_embedding(prediction: Prediction) -> Fields:
            vector = prediction.outputs[EMBEDDING]

            if query.encoding_format == "float":
                return {"embedding": vector.tolist(), "warnings": prediction.warnings}
            encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            return {"embedding": encoded, "warnings": prediction.warnings}

        return _respond(admitted, upload, outcomes, format_embedding)


def _respond(
    admitted: AdmittedRequest,
    upload: Upload,
    outcomes: Sequence[Outcome],
    format_result: Callable[[Prediction], Fields],
) -> Response:
    """Create the response with *outcomes*, or raise the error of a single image as `RejectedError`."""
    if not upload.is_list and isinstance(outcomes[0], HttpError):
        raise RejectedError(outcomes[0])

    results: list[Fields] = []
    root_path = admitted.request.scope["root_path"]
    for outcome in outcomes:
        if isinstance(outcome, HttpError):
            admitted.service.metrics.rejected.labels(outcome.code).inc()
            results.append({"error": describe_error(outcome, root_path).model_dump()})
        else:
            results.append(format_result(outcome))

    body = {"results": results} if upload.is_list else results[0]
    headers = {"Server-Timing": admitted.context.server_timing()}
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")
