"""Describe a model, and build the JSON or binary response of an inference request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sopdeploy_service.api.v2.request import ENCODED, FLOATS, IMAGE, PIXELS
from sopdeploy_service.inference.model_worker import Model
from sopdeploy_service.inference.results import HttpError, Outcome, Prediction, RejectedError

HEADER_LENGTH = "Inference-Header-Content-Length"


def model_metadata(model: Model) -> dict[str, Any]:
    """Build the response of `GET /v2/models/{name}`; `platform` is Triton's name of the runtime."""
    manifest = model.bundle.manifest
    is_engine = model.loaded.runtime.name.startswith("tensorrt ")  # the version follows
    pixels = manifest.inputs[0]
    inputs = (pixels.name, PIXELS, pixels.shape), (IMAGE, ENCODED, (None, 1))
    outputs = ((output.name, FLOATS, output.shape) for output in manifest.outputs)
    tensors = {
        group: [
            {"name": name, "datatype": datatype, "shape": [-1 if n is None else n for n in shape]}
            for name, datatype, shape in members
        ]
        for group, members in {"inputs": inputs, "outputs": outputs}.items()
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
    head: Mapping[str, Any], values: Mapping[str, NDArray[Any]], requested: Mapping[str, bool]
) -> tuple[bytes, dict[str, str]]:
    """Build the body and headers from *head* and the *requested* ones of *values*, (n, ...) by name.

    *requested* tells whether an output is returned in binary.
    """
    binary_parts: list[bytes] = []
    outputs = []
    for name, binary in requested.items():
        array = np.ascontiguousarray(values[name], "<f4")
        described: dict[str, Any] = {"name": name, "datatype": FLOATS, "shape": list(array.shape)}
        if binary:
            binary_parts.append(array.tobytes())
            described["parameters"] = {"binary_data_size": array.nbytes}
        else:
            described["data"] = array.reshape(-1)
        outputs.append(described)
    text = orjson.dumps({**head, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary_parts:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *binary_parts]), headers
