"""The endpoints of the Open Inference Protocol, and the JSON or binary responses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version as package_version
from typing import Annotated, Any

import numpy as np
import orjson
import pydantic
from fastapi import APIRouter, Header, HTTPException, Request, Response
from numpy.typing import NDArray

from sopdeploy.bundle.logit_ranges import SMALLEST
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy_service.api.admission import (
    MAX_JSON_BYTES,
    admit,
    find_and_record_model,
    json_response,
    read_body,
    service_of,
)
from sopdeploy_service.api.v2.request import BYTES, FP32, IMAGE_INPUT, UINT8, parse_body
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError
from sopdeploy_service.inference.service import Traffic

HEADER_LENGTH = "Inference-Header-Content-Length"

_ERROR: dict[str, Any] = {
    "description": "the code is in the header `X-Error-Code`",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {"type": "string"}},
            }
        }
    },
}
_STATUSES = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)
_ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys(_STATUSES, _ERROR)

MODEL = "/v2/models/{name}"
VERSION = "/v2/models/{name}/versions/{version}"
_VERSION = package_version("sopdeploy")
NO_STATISTICS = HTTPException(
    404, "the statistics extension is not offered; GET /metrics has these figures"
)
router = APIRouter(tags=["Open Inference Protocol"], responses=_ERRORS)
INFER_BODY = {
    "requestBody": {
        "required": True,
        "description": "the request of the Open Inference Protocol",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["inputs"]}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
# Not null in the OpenAPI document: the paths that have a version need one, and generators of clients
# leave out a path with a parameter that may be null.
Version = Annotated[str | None, pydantic.WithJsonSchema({"type": "string"})]
JsonLengthHeader = Annotated[
    str | None,
    Header(
        alias=HEADER_LENGTH, description="the length of the JSON, if binary tensors follow it"
    ),
]


@router.get("/v2")
@router.get("/v2/", include_in_schema=False)  # the path in the OpenAPI document of the protocol
async def server() -> Response:
    """Name the server and the extensions it supports."""
    return json_response(
        {"name": "sopdeploy", "version": _VERSION, "extensions": ["binary_tensor_data"]}
    )


@router.get("/v2/health/live")
async def live(request: Request) -> Response:
    """Respond with 200 unless a model worker is dead."""
    alive = service_of(request).state != "runtime_dead"
    return json_response({"live": alive}, 200 if alive else 503)


@router.get("/v2/health/ready")
async def ready(request: Request) -> Response:
    """Respond with 200 while there is a model and every model can predict."""
    is_ready = service_of(request).state == "ok"
    return json_response({"ready": is_ready}, 200 if is_ready else 503)


@router.get(MODEL + "/ready")
@router.get(VERSION + "/ready")
async def model_ready(request: Request, name: str, version: Version = None) -> Response:
    """Respond with 200 while the model can predict."""
    service = service_of(request)
    model = find_and_record_model(request, name, version)
    is_ready = not model.is_down and service.state not in {"starting", "draining"}
    return json_response({"name": model.name, "ready": is_ready}, 200 if is_ready else 503)


@router.get(MODEL)
@router.get(VERSION)
async def model_metadata(request: Request, name: str, version: Version = None) -> Response:
    """Return the inputs and outputs of the model."""
    try:
        model = find_and_record_model(request, name, version)
    except RejectedError as error:
        if (
            name == "stats" and version is None
        ):  # Triton's path for the statistics of all models
            raise NO_STATISTICS from error
        raise
    manifest = model.bundle.manifest
    is_engine = model.runtime.name.startswith("tensorrt ")  # the version follows
    pixels = manifest.inputs[0]

    def describe(tensor: str, datatype: str, shape: Sequence[int | None]) -> dict[str, object]:
        sides = [-1 if side is None else side for side in shape]  # -1: of any length
        return {"name": tensor, "datatype": datatype, "shape": sides}

    return json_response(
        {
            "name": model.name,
            "versions": [model.version],
            "platform": "tensorrt_plan" if is_engine else "onnxruntime_onnx",  # Triton's names
            "inputs": [
                describe(pixels.name, UINT8, pixels.shape),
                describe(IMAGE_INPUT, BYTES, (None, 1)),
            ],
            "outputs": [
                describe(output.name, FP32, output.shape) for output in manifest.outputs
            ],
        }
    )


@router.get(MODEL + "/stats", include_in_schema=False)
@router.get(VERSION + "/stats", include_in_schema=False)
async def model_statistics(name: str, version: Version = None) -> Response:
    """Refuse the request: the statistics extension is not offered."""
    del name, version
    raise NO_STATISTICS


@router.post(MODEL + "/infer", openapi_extra=INFER_BODY)
@router.post(VERSION + "/infer", openapi_extra=INFER_BODY)
async def model_infer(
    request: Request,
    name: str,
    version: Version = None,
    json_length_header: JsonLengthHeader = None,
) -> Response:
    """Return the outputs of 1..n images, sent as a tensor or as encoded files."""
    # Read the body.
    async with admit(request, name, version) as admitted:
        settings = admitted.service.settings
        model = admitted.model
        body = await read_body(admitted, settings.max_body_bytes)
        parsed = await admitted.parse(
            parse_body, body, json_length_header, model.bundle.manifest, settings.max_images,
            MAX_JSON_BYTES,
        )  # fmt: skip

        if parsed.timeout_seconds is not None:
            admitted.deadline = min(
                admitted.deadline, admitted.received + parsed.timeout_seconds
            )

        # Run the images.
        outcomes = await admitted.infer(
            parsed.images, features=EMBEDDING in parsed.is_binary, traffic=Traffic()
        )
        for outcome in outcomes:
            if isinstance(outcome, Prediction):
                answer = model.decision.answer(outcome.outputs[model.logits_name], top_k=1)
                admitted.service.count_answer(model, answer)

        # Respond with the outputs that the request has chosen.
        head = {"model_name": model.name, "model_version": model.version}
        if parsed.id is not None:
            head = {"id": parsed.id, **head}

        content, headers = format_response(head, stack_outputs(outcomes), parsed.is_binary)
        return Response(
            content, headers={**headers, "Server-Timing": admitted.context.server_timing()}
        )


def stack_outputs(outcomes: Sequence[Outcome]) -> dict[str, NDArray[np.float32]]:
    """Stack the outputs of all images to (n, ...) by name; the first rejected image rejects the request."""
    predictions: list[Prediction] = []

    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, HttpError):
            raise RejectedError(replace(outcome, message=f"image {index}: {outcome.message}"))
        predictions.append(outcome)

    names = predictions[0].outputs
    return {
        name: np.stack([prediction.outputs[name] for prediction in predictions])
        for name in names
    }


def format_response(
    head: Mapping[str, Any], values: Mapping[str, NDArray[Any]], is_binary: Mapping[str, bool]
) -> tuple[bytes, dict[str, str]]:
    """Build body and headers from *head* and the *values* (n, ...) of the outputs in *is_binary*.

    The JSON has the values of an output as a flat list, or the size of its binary values, which
    follow it.
    """
    # Describe each output; its values are in the JSON or follow it.
    binary_parts: list[bytes] = []
    outputs = []
    for name, follows_json in is_binary.items():
        array = np.ascontiguousarray(values[name], "<f4")

        description: dict[str, object] = {
            "name": name,
            "datatype": FP32,
            "shape": list(array.shape),
        }

        if follows_json:
            binary_parts.append(array.tobytes())
            description["parameters"] = {"binary_data_size": array.nbytes}
        else:
            # JSON has no infinity, which is the logit of a masked class.
            description["data"] = array.reshape(-1).clip(min=SMALLEST)
        outputs.append(description)

    text = orjson.dumps({**head, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary_parts:
        return text, {"Content-Type": "application/json"}

    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *binary_parts]), headers
