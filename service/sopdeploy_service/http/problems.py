"""Errors on the wire: `application/problem+json`, for every status the server answers with."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from sopdeploy_service.api.schema import PROBLEM_JSON, Problem
from sopdeploy_service.http.headers import with_head
from sopdeploy_service.inference.results import CLIENT_GONE, Rejection
from sopdeploy_service.observability.request_context import CURRENT

INTERNAL = Rejection("internal_error", 500, "the server made a mistake; its log tells more")

log = logging.getLogger("sopdeploy.http")


class RejectedError(Exception):
    """A request that ends here, with the answer that *refusal* stands for."""

    def __init__(self, refusal: Rejection) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def json_response(
    body: BaseModel | dict[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return *body* as a JSON response; of a model what is None is left out."""
    return Response(
        orjson.dumps(body if isinstance(body, dict) else body.model_dump(exclude_none=True)),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def problem_response(
    refusal: Rejection, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> Response:
    """Return the response that tells *refusal* to who asked for *path*.

    The Open Inference Protocol has a form of its own, which its clients parse; it has no place for the
    stable code, so that stands in the header `X-Error-Code`.
    """
    tally = CURRENT.get()
    if tally is not None:
        tally.code = refusal.code
    extra = dict(headers or {})
    if refusal.retry_after is not None:
        extra["Retry-After"] = str(refusal.retry_after)
    if refusal.status in {408, 413, 503}:
        extra["Connection"] = "close"
    if path == "/v2" or path.startswith("/v2/"):
        extra["X-Error-Code"] = refusal.code
        error = orjson.dumps({"error": refusal.message})
        return Response(error, status_code=refusal.status, headers=extra, media_type="application/json")
    body = orjson.dumps(Problem.of(refusal).model_dump())
    return Response(body, status_code=refusal.status, headers=extra, media_type=PROBLEM_JSON)


def refused(request: Request, problem: RejectedError) -> Response:
    """Count *problem* and return the answer to *request* that it stands for."""
    metrics = request.app.state.service.metrics
    if problem.refusal is CLIENT_GONE:
        metrics.cancelled()
    else:
        metrics.rejected(problem.refusal.code)
    return problem_response(problem.refusal, path=request.url.path)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how the OpenAPI description tells that these *statuses* come with a `Problem`."""
    body = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {PROBLEM_JSON: body}}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Make every error of *app* a problem; no FastAPI default is left."""

    @app.exception_handler(RejectedError)
    async def refused_error(request: Request, problem: RejectedError) -> Response:
        return refused(request, problem)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, problem: HTTPException) -> Response:
        code = HTTPStatus(problem.status_code).name.lower()
        refusal = Rejection(code, problem.status_code, str(problem.detail))
        return problem_response(refusal, with_head(problem.headers or {}), path=request.url.path)

    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        refusal = Rejection("invalid_parameter", 422, f"{where}: {first['msg']}")
        return problem_response(refusal, path=request.url.path)
