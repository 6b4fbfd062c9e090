"""The protocol's bodies for the OpenAPI description; what really counts is checked in `request`."""

from typing import Any

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
