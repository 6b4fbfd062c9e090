"""Other paths of routes, for platforms such as SageMaker that call a server at paths of their own."""

from fastapi import APIRouter
from fastapi.routing import APIRoute

from sopdeploy_service.api import status, v1

ALIASES = {"/ping": "/readyz", "/invocations": "/v1/classify"}

router = APIRouter()
for route in (*status.router.routes, *v1.router.routes):
    for path, target in ALIASES.items():
        if isinstance(route, APIRoute) and route.path == target:
            router.add_api_route(
                path,
                route.endpoint,
                methods=sorted(route.methods or ()),
                summary=f"As `{target}`, for platforms that call this path",
                description=" ",  # the one of the other route is long
                response_model=route.response_model,
                responses=route.responses,
                tags=list(route.tags),
                openapi_extra=route.openapi_extra,
                route_class_override=type(route),
            )
