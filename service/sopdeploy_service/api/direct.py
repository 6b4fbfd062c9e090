"""The short way to the one endpoint that counts, whose parameters all stand in the query.

FastAPI finds routes and reads parameters of any kind through one general machine, which is a good part of
what a request costs. A query that is plain is read here and the endpoint called with it; any other, each that
is wrong, and every other path goes FastAPI's way. So there is one description and one wording of every error.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from sopdeploy_service.http.problems import RejectedError, refused

Read = Callable[[str], Any]

NUMBER = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)
WORD = re.compile(r"[A-Za-z0-9._~-]{1,200}")  # what no URL has to escape
MOST = 500  # characters


class Direct:
    """Wraps *app*; calls the endpoint of *route* for queries that *readers* read, which are None for others.

    The endpoint must take the request and, all of them optional, the parameters that *readers* names.
    """

    def __init__(self, app: ASGIApp, route: APIRoute, readers: Mapping[str, Read]) -> None:
        self._app = app
        self._route = route
        self._path = route.path
        (self._method,) = route.methods or {""}
        self._readers = readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        given = self._given(scope)
        if given is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        request = Request(scope, receive, send)
        try:
            response: Response = await self._route.endpoint(request, **given)
        except RejectedError as problem:
            response = refused(request, problem)
        await response(scope, receive, send)

    def _given(self, scope: Scope) -> dict[str, Any] | None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != self._method:
            return None
        return read_query(scope["query_string"].decode("latin-1"), self._readers)


def read_query(query: str, readers: Mapping[str, Read]) -> dict[str, Any] | None:
    """Return the parameters in *query*; None where one is not plain, not known or there twice."""
    if not query:
        return {}
    if len(query) > MOST:
        return None
    found: dict[str, Any] = {}
    for pair in query.split("&"):
        name, _, text = pair.partition("=")
        read = readers.get(name)
        value = None if read is None or name in found else read(text)
        if value is None:
            return None
        found[name] = value
    return found


def number(text: str) -> int | None:
    """Return the whole number 1 to 999999 in *text*."""
    return int(text) if NUMBER.fullmatch(text) else None


def word(text: str) -> str | None:
    """Return *text* where it needs no escape."""
    return text if WORD.fullmatch(text) else None


def flag(text: str) -> bool | None:
    """Return what `true` or `false` says."""
    return {"true": True, "false": False}.get(text)
