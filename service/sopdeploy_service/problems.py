"""Errors on the wire: `application/problem+json`, for every status the server answers with."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sopdeploy_service.outcome import CLIENT_GONE, Refusal
from sopdeploy_service.schema import PROBLEM_JSON, Problem

LINGER_SECONDS = 2.0
LINGER_BYTES = 100_000_000

INTERNAL = Refusal("internal_error", 500, "the server made a mistake; its log tells more")

log = logging.getLogger("sopdeploy.http")


class RefusedError(Exception):
    """A request that ends here, with the answer that *refusal* stands for."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def json_response(
    body: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return *body* as a JSON response."""
    return Response(
        orjson.dumps(body.model_dump()),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def problem_response(
    refusal: Refusal, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> Response:
    """Return the response that tells *refusal* to who asked for *path*.

    The Open Inference Protocol has a form of its own, which its clients parse; it has no place for the
    stable code, so that stands in the header `X-Error-Code`.
    """
    extra = dict(headers or {})
    if refusal.retry_after is not None:
        extra["Retry-After"] = str(refusal.retry_after)
    if refusal.status in {408, 413, 503}:
        extra["Connection"] = "close"
    kind = LingeringResponse if refusal.status == 413 else Response
    if path == "/v2" or path.startswith("/v2/"):
        extra["X-Error-Code"] = refusal.code
        error = orjson.dumps({"error": refusal.message})
        return kind(error, status_code=refusal.status, headers=extra, media_type="application/json")
    body = orjson.dumps(Problem.of(refusal).model_dump())
    return kind(body, status_code=refusal.status, headers=extra, media_type=PROBLEM_JSON)


class LingeringResponse(Response):
    """Answers a client that is still sending, and listens a little longer before it hangs up.

    Closing at once would reset the connection, and the client would never read why.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the answer, then read what the client still sends, within limits."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def discard(receive: Receive) -> None:
    """Read and forget the rest of a request, up to `LINGER_BYTES`."""
    seen = 0
    while seen < LINGER_BYTES:
        message = await receive()
        seen += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def install(app: FastAPI) -> None:
    """Make every error of *app* a problem; no FastAPI default is left."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, problem: RefusedError) -> Response:
        metrics = request.app.state.service.metrics
        if problem.refusal is CLIENT_GONE:
            metrics.cancelled()
        else:
            metrics.rejected(problem.refusal.code)
        return problem_response(problem.refusal, path=request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, problem: HTTPException) -> Response:
        code = HTTPStatus(problem.status_code).name.lower()
        refusal = Refusal(code, problem.status_code, str(problem.detail))
        return problem_response(refusal, problem.headers, path=request.url.path)

    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        refusal = Refusal("invalid_parameter", 422, f"{where}: {first['msg']}")
        return problem_response(refusal, path=request.url.path)
