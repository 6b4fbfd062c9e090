"""Routes that take the request and a model of its query, which FastAPI documents and this module reads.

For each request, FastAPI looks up the type of each field of a query, and prepares for dependencies, which these
routes do not have.
"""

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import pydantic
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute


class QueryRoute(APIRoute):
    """Calls an endpoint with the request and its parameter `query`, a pydantic model, and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request; it raises `RequestValidationError` for a wrong query, as FastAPI does."""
        endpoint = self.endpoint
        model: type[pydantic.BaseModel] = get_type_hints(endpoint)["query"]

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
