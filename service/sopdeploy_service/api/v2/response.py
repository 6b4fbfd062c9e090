"""Describe a model, and build the JSON or binary response of an inference request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sopdeploy_service.api.v2.request import IMAGE, RequestedOutput, signature_of
from sopdeploy_service.inference.model_worker import Model
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError

HEADER_LENGTH = "Inference-Header-Content-Length"


def model_metadata(model: Model) -> dict[str, Any]:
    """Build the response of `GET /v2/models/{name}`; `platform` is Triton's name of the runtime."""
    signature = signature_of(model.bundle, 1)
    is_engine = model.loaded.runtime.name.startswith("tensorrt ")  # the version follows
    tensors = {
        group: [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            for tensor in members
        ]
        for group, members in {"inputs": (signature.tensor, IMAGE), "outputs": signature.outputs}.items()
    }
    platform = "tensorrt_plan" if is_engine else "onnxruntime_onnx"
    return {"name": model.name, "versions": [model.version], "platform": platform, **tensors}


def stack_outputs(outcomes: Sequence[Outcome]) -> dict[str, NDArray[np.float32]]:
    """Stack the outputs of all images to (n, ...) by name.

    The protocol has one status per request, so the first rejected image rejects the request.
    """
    predictions: list[Prediction] = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, HttpError):
            raise RejectedError(replace(outcome, message=f"image {index}: {outcome.message}"))
        predictions.append(outcome)
    names = predictions[0].outputs
    return {name: np.stack([prediction.outputs[name] for prediction in predictions]) for name in names}


def format_response(
    head: Mapping[str, Any], values: Mapping[str, NDArray[Any]], requested: Sequence[RequestedOutput]
) -> tuple[bytes, dict[str, str]]:
    """Build the body and headers from *head* and the *requested* outputs (n, ...)."""
    binary_parts: list[bytes] = []
    outputs = []
    for output in requested:
        name = output.tensor.name
        array = np.ascontiguousarray(values[name], "<f4")
        described: dict[str, Any] = {
            "name": name,
            "datatype": output.tensor.datatype,
            "shape": list(array.shape),
        }
        if output.binary:
            binary_parts.append(array.tobytes())
            described["parameters"] = {"binary_data_size": array.nbytes}
        else:
            described["data"] = array.reshape(-1)
        outputs.append(described)
    text = orjson.dumps({**head, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(output.binary for output in requested):
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *binary_parts]), headers
