"""The short way to an endpoint whose parameters all stand in the query.

FastAPI reads parameters of any kind through one general machine, which is a good part of what a request
costs. A query that is plain is read here and the endpoint called with it; any other, and each that is wrong,
goes FastAPI's way. So there is one description, and one wording of every error.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

Read = Callable[[str], Any]

NUMBER = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)
WORD = re.compile(r"[A-Za-z0-9._~-]{1,200}")  # what no URL has to escape
MOST = 500  # characters


def direct(readers: Mapping[str, Read]) -> type[APIRoute]:
    """Return a class of routes that read the query with *readers*, which give None for what is not plain.

    The endpoint must take the request and, all of them optional, the parameters that *readers* names.
    """

    class Direct(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            query = scope["query_string"].decode("latin-1")
            given = read_query(query, readers) if scope["method"] in (self.methods or ()) else None
            if given is None:
                await super().handle(scope, receive, send)
                return
            response: Response = await self.endpoint(Request(scope, receive, send), **given)
            await response(scope, receive, send)

    return Direct


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
