"""Routes that take the request and a model of its query, which FastAPI documents and this module reads.

For each request, FastAPI looks up the type of each field of a query, and prepares for dependencies, which these
routes do not have. A request without a query does not need its layers at all.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, get_type_hints

import pydantic
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send


class QueryRoute(APIRoute):
    """Calls an endpoint with the request and its parameter `query`, a pydantic model, and nothing else."""

    @property
    def query_model(self) -> type[pydantic.BaseModel]:
        """The type of the parameter `query` of the endpoint."""
        model: type[pydantic.BaseModel] = get_type_hints(self.endpoint)["query"]
        return model

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request; it raises `RequestValidationError` for a wrong query, as FastAPI does."""
        endpoint = self.endpoint
        model = self.query_model

        async def answer(request: Request) -> Response:
            try:
                query = model.model_validate(dict(request.query_params))
            except pydantic.ValidationError as problem:
                errors = [
                    {**error, "loc": ("query", *error["loc"])} for error in problem.errors()
                ]
                raise RequestValidationError(errors) from problem

            response: Response = await endpoint(request, query)
            return response

        return answer


class DirectRoutes:
    """Calls the endpoint of a `QueryRoute` for a POST without a query, and *app* for all other requests.

    FastAPI and Starlette have further layers in front of an endpoint. They do nothing for such a request, but
    take time on the event loop, which all requests share.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = {
            route.path: (route, route.query_model())
            for route in routes
            if isinstance(route, QueryRoute)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; exceptions of the endpoint are for the middleware around this one."""
        path = scope["path"].removeprefix(scope["root_path"]) if scope["type"] == "http" else ""
        is_direct = path in self._routes and scope["method"] == "POST"
        if not is_direct or scope["query_string"]:
            await self._app(scope, receive, send)
            return

        route, empty_query = self._routes[path]
        scope["route"] = route
        response: Response = await route.endpoint(Request(scope, receive, send), empty_query)
        await response(scope, receive, send)
