"""The endpoints of the protocol; every answer is JSON, or JSON with binary tensors behind it."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from sopdeploy_service.api.upload import raise_if_rejected, read_body, service_of, use_model
from sopdeploy_service.api.v2 import metadata
from sopdeploy_service.api.v2.metadata import Signature
from sopdeploy_service.api.v2.response import answer_infer
from sopdeploy_service.http import strict_json as fields
from sopdeploy_service.http.auth import needs
from sopdeploy_service.http.strict_json import bad_request, parse
from sopdeploy_service.inference.model import Model

PARAMETERS = {"type": "object", "additionalProperties": True}
INPUT = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string", "description": "the bundle's input, or `IMAGE` for encoded images"},
        "datatype": {"type": "string", "enum": ["UINT8", "FP32", "BYTES"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
        "parameters": PARAMETERS,
        "data": {"type": "array", "items": {}, "description": "row by row, flat or nested; BYTES as base64"},
    },
}
OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "parameters": PARAMETERS},
}
INFER_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "description": "where the JSON ends and the binary tensors begin",
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": PARAMETERS,
                        "inputs": {"type": "array", "items": INPUT, "minItems": 1},
                        "outputs": {"type": "array", "items": OUTPUT},
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
REPOSITORY_BODY: dict[str, Any] = {
    "requestBody": {"required": False, "content": {"application/json": {"schema": {"type": "object"}}}}
}
ERROR: dict[str, Any] = {
    "description": "the code is in the header `X-Error-Code`",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504), ERROR
)


Answer = Callable[[Request, str, str | None], Awaitable[Response]]

ADMIN = [Depends(needs("admin"))]
SMALL_BODY = 100_000  # bytes of what is said to the repository

router = APIRouter(tags=["Open Inference Protocol"], responses=ERRORS)


def json(value: Any, status: int = 200) -> Response:
    """Return *value* as a JSON response."""
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")


def with_and_without_version(method: str, suffix: str, **options: Any) -> Callable[[Answer], Answer]:
    """Register an endpoint of a model for its current version, and for the one that the path names."""

    def register(work: Answer) -> Answer:
        async def current(request: Request, name: str) -> Response:
            return await work(request, name, None)

        async def exact(request: Request, name: str, version: str) -> Response:
            return await work(request, name, version)

        for path, endpoint in (("", current), ("/versions/{version}", exact)):
            router.add_api_route(
                f"/v2/models/{{name}}{path}{suffix}",
                endpoint,
                methods=[method],
                name=work.__name__,
                description=work.__doc__,
                **options,
            )
        return work

    return register


@router.get("/v2")
async def server() -> Response:
    """Say what this server is and which extensions it knows."""
    return json(metadata.server_metadata())


@router.get("/v2/health/live")
async def live(request: Request) -> Response:
    """Give 200 unless an engine is dead."""
    alive = service_of(request).state != "engine_dead"
    return json({"live": alive}, 200 if alive else 503)


@router.get("/v2/health/ready")
async def ready(request: Request) -> Response:
    """Give 200 while there is a model and every model answers."""
    answers = service_of(request).state == "ok"
    return json({"ready": answers}, 200 if answers else 503)


@router.get("/v2/models/stats")
async def all_statistics(request: Request) -> Response:
    """Give the statistics of every model."""
    return json({"model_stats": [metadata.statistics(m) for m in service_of(request).registry.models()]})


@with_and_without_version("GET", "/ready")
async def model_ready(request: Request, name: str, version: str | None) -> Response:
    """Give 200 while the model answers."""
    service = service_of(request)
    model = found(request, name, version)
    answers = not model.dead and service.state != "draining"
    return json({"name": model.name, "ready": answers}, 200 if answers else 503)


@with_and_without_version("GET", "/config")
async def model_config(request: Request, name: str, version: str | None) -> Response:
    """Give the model as a Triton configuration would have it."""
    model = found(request, name, version)
    return json(metadata.model_config(model, signature_of(request, model), service_of(request).settings))


@with_and_without_version("GET", "/stats")
async def model_statistics(request: Request, name: str, version: str | None) -> Response:
    """Give what the model has done since it was loaded."""
    return json({"model_stats": [metadata.statistics(found(request, name, version))]})


@with_and_without_version("GET", "")
async def model_metadata(request: Request, name: str, version: str | None) -> Response:
    """Give the model's inputs and outputs."""
    model = found(request, name, version)
    loaded = service_of(request).registry.models()
    versions = [other.version for other in loaded if other.name == name]
    return json(metadata.model_metadata(model, versions, signature_of(request, model)))


@with_and_without_version("POST", "/infer", openapi_extra=INFER_BODY)
async def infer(request: Request, name: str, version: str | None) -> Response:
    """Give the outputs for 1..n images, sent as a tensor or as encoded files."""
    return await answer_infer(request, name, version)


@router.post("/v2/repository/index", openapi_extra=REPOSITORY_BODY)
async def index(request: Request) -> Response:
    """List the loaded models; with `{"ready": true}` those that answer."""
    asked = await read_object(request)
    only_ready = fields.as_flag(asked.get("ready"), "ready")
    loaded = service_of(request).registry.models()
    return json([metadata.indexed(model) for model in loaded if not (only_ready and model.dead)])


@router.post("/v2/repository/models/{name}/load", openapi_extra=REPOSITORY_BODY, dependencies=ADMIN)
async def load(request: Request, name: str) -> Response:
    """Let a bundle beside those of the start answer for *name*; `parameters.folder` says which of several."""
    parameters = fields.as_object((await read_object(request)).get("parameters"), "parameters")
    unknown = sorted(parameters.keys() - {"folder"})
    if unknown:
        raise bad_request(
            "malformed_request", f"parameters: {unknown[0][:100]!r} is not supported, only `folder`"
        )
    folder = parameters.get("folder")
    wanted = None if folder is None else fields.as_text(folder, "parameters.folder")
    use_model(request, raise_if_rejected(await service_of(request).registry.load(name, wanted)))
    return Response()


@router.post("/v2/repository/models/{name}/unload", openapi_extra=REPOSITORY_BODY, dependencies=ADMIN)
async def unload(request: Request, name: str) -> Response:
    """Let *name* answer no more; requests that are with it still get their answers."""
    await read_object(request)
    raise_if_rejected(await service_of(request).registry.unload(name))
    return Response()


def found(request: Request, name: str, version: str | None) -> Model:
    """Return the model that is meant; the answer will carry its digest."""
    model = raise_if_rejected(service_of(request).registry.find(name, version))
    use_model(request, model)
    return model


def signature_of(request: Request, model: Model) -> Signature:
    """Return the tensors of *model*."""
    return Signature.of(model.bundle, service_of(request).settings.max_images)


async def read_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body; no body is an empty one."""
    settings = service_of(request).settings
    deadline = time.monotonic() + settings.request_timeout
    raw = await read_body(request, SMALL_BODY, deadline)
    return fields.as_object(parse(raw, SMALL_BODY), "the body") if raw.strip() else {}
