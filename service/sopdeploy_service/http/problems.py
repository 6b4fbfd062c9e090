"""Error responses: `application/problem+json` (RFC 9457), except below `/v2`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from sopdeploy.base.config import describe_problem
from sopdeploy.base.nearest import ask_for, did_you_mean
from sopdeploy.bundle.http_api import Problem
from sopdeploy.images.formats import too_large_error
from sopdeploy_service.inference.results import HttpError, RejectedError

PROBLEM_JSON = "application/problem+json"
# Parts of the paths at which servers of MLflow, SageMaker, TorchServe, TensorFlow and others
# classify.
PATH_PARTS_OF_OTHER_SERVERS = {"predict", "predictions", "invocations", "infer", "inference"}
INTERNAL = HttpError("internal_error", 500, "internal error; the server log has the details")


def body_too_large(headers: Mapping[str, str], limit: int) -> RejectedError:
    """Create the error of a body of more than *limit* bytes; *headers* tell whether it has several images."""
    error = HttpError.from_image_error(too_large_error(limit))
    content_type = headers.get("content-type", "").lower()
    if content_type.startswith(("multipart/", "application/json")):
        message = (
            f"the images are together larger than {limit} bytes, the limit; send fewer at once"
        )
        error = replace(error, message=message)
    return RejectedError(error)


def bad_request(code: str, message: str) -> RejectedError:
    """Create the error of an invalid request, status 400."""
    return RejectedError(HttpError(code, 400, message))


def describe_error(error: HttpError, root_path: str = "") -> Problem:
    """Create the response body of *error*; the page about its code is below *root_path*."""
    title = "Client Closed Request" if error.status == 499 else HTTPStatus(error.status).phrase
    page = f"{root_path}/errors#{error.code}"
    return Problem(
        type=page, title=title, status=error.status, code=error.code, detail=error.message
    )


def problem_response(
    reason: HttpError, given_headers: Mapping[str, str], path: str, root_path: str
) -> Response:
    """Create the response of *reason* to a request for *path* below *root_path*, with *given_headers*.

    Below `/v2`, the body is `{"error": message}` as in the Open Inference Protocol, and the
    code is in the header `X-Error-Code`.
    """
    # Headers by status.
    headers = dict(given_headers)
    if reason.retry_after is not None:
        headers["Retry-After"] = str(reason.retry_after)

    # The connection is no longer of use: the rest of the body may be unread (408, 413), or the
    # client should ask another server (503).
    if reason.status in {408, 413, 503}:
        headers["Connection"] = "close"

    if reason.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="sopdeploy"'

    # Paths of Triton's protocol have the errors of that protocol, all other paths problem details
    # (RFC 9457).
    if path == "/v2" or path.startswith("/v2/"):
        headers["X-Error-Code"] = reason.code
        body = orjson.dumps({"error": reason.message})
        media_type = "application/json"
    else:
        body = orjson.dumps(describe_error(reason, root_path).model_dump())
        media_type = PROBLEM_JSON
    return Response(body, status_code=reason.status, headers=headers, media_type=media_type)


def respond_with_error(
    scope: Scope, reason: HttpError, headers: Mapping[str, str] | None = None
) -> Response:
    """Create the response of *reason* and record its code for the access log."""
    context = scope["state"]["context"]
    context.code = reason.code
    return problem_response(reason, headers or {}, context.path, scope["root_path"])


def describe_statuses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe *statuses* with a `Problem` body for OpenAPI."""
    body = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {PROBLEM_JSON: body}}
        for status in statuses
    }


def handle_errors(app: FastAPI, paths: Sequence[str]) -> None:
    """Make *app*, which has *paths*, respond with problems to the errors that FastAPI raises itself."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        # HEAD is allowed where GET is.
        headers = dict(error.headers or {})
        allowed = {method.strip() for method in headers.get("Allow", "").split(",")}
        if "GET" in allowed:  # `RequestContextMiddleware` handles HEAD like it
            headers["Allow"] = ", ".join(sorted(allowed | {"HEAD"}))

        status = HTTPStatus(error.status_code)
        detail = str(error.detail)
        path = request.scope["state"]["context"].path
        root = request.scope["root_path"]

        # Tell what to do, unless the route has: the nearest path, or the methods that the path has.
        if status == HTTPStatus.NOT_FOUND and detail == status.phrase:
            # Where another server classifies, such as TorchServe at `/predictions/NAME`, tell where
            # this one does. Paths below `/v2/` are those of this server itself.
            parts = re.split("[/:]", path[:100])
            is_of_other_server = bool(PATH_PARTS_OF_OTHER_SERVERS.intersection(parts))
            if is_of_other_server and not path.startswith("/v2/"):
                hint = ask_for(f"{root}/v1/classify")
            else:
                hint = did_you_mean(path, {known: f"{root}{known}" for known in paths})

            hints = filter(None, (hint, f"{root}/docs lists all"))
            detail = f"no such path; {' '.join(hints)}"
        elif status == HTTPStatus.METHOD_NOT_ALLOWED:
            use = f"use {headers['Allow']} ({root}/docs has examples)"
            if path == "/" and request.method == "POST":
                use = f"send images to {root}/v1/classify ({root}/docs has examples)"
            detail = f"{root}{path} does not accept {request.method}; {use}"

        return respond_with_error(
            request.scope, HttpError(status.name.lower(), status, detail), headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # An unknown parameter of the query: list those that the route has.
        first = error.errors()[0]
        if first["type"] == "extra_forbidden" and first["loc"][0] == "query":
            operations = request.app.openapi()["paths"][request.scope["route"].path]
            parameters = operations[request.method.lower()]["parameters"]
            known = [
                parameter["name"] for parameter in parameters if parameter["in"] == "query"
            ]

            unknown = str(first["loc"][-1])[:100]
            message = f"{unknown!r}: unknown parameter; known are {', '.join(known)}"
            return respond_with_error(
                request.scope, HttpError("unknown_parameter", 400, message)
            )

        message = describe_problem(first)
        return respond_with_error(request.scope, HttpError("invalid_parameter", 422, message))
