"""Describe a model, and build the JSON or binary response of an inference request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from struct import pack
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sopdeploy.decision import top_indices
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
    head: Mapping[str, Any],
    values: Mapping[str, NDArray[Any]],
    requested: Sequence[RequestedOutput],
    labels: Mapping[str, Sequence[str]],
) -> tuple[bytes, dict[str, str]]:
    """Build the body and headers from *head* and the *requested* outputs (n, ...).

    *labels* maps the names of outputs to class names, for outputs that have them.
    """
    binary_parts: list[bytes] = []
    outputs = []
    for output in requested:
        name = output.tensor.name
        array = np.ascontiguousarray(values[name], "<f4")
        described: dict[str, Any] = {"name": name}
        elements: Any
        if output.num_classes:
            rows = rank_labels(array, output.num_classes, labels.get(name, ()))
            described |= {"datatype": "BYTES", "shape": [len(rows), len(rows[0])]}
            elements = [text for row in rows for text in row]
        else:
            described |= {"datatype": output.tensor.datatype, "shape": list(array.shape)}
            elements = array.reshape(-1)
        if output.binary:
            raw = _pack_texts(elements) if output.num_classes else array.tobytes()
            binary_parts.append(raw)
            described["parameters"] = {"binary_data_size": len(raw)}
        else:
            described["data"] = elements
        outputs.append(described)
    text = orjson.dumps({**head, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(output.binary for output in requested):
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *binary_parts]), headers


def _pack_texts(texts: Sequence[str]) -> bytes:
    """Join *texts*; each is its length in bytes, 4 bytes little-endian, and its UTF-8 form."""
    elements = [text.encode() for text in texts]
    return b"".join(pack("<I", len(element)) + element for element in elements)


def rank_labels(values: NDArray[Any], num_classes: int, labels: Sequence[str]) -> list[list[str]]:
    """Format the *num_classes* largest values of each row of *values* as `value:index:label`.

    The value is the shortest text that reads back as the same float32, as in Triton. Ties keep the order of
    the labels, as in `/v1/classify`.
    """
    rows = values.reshape(len(values), -1)
    return [
        [
            f"{row[index]!s}:{index}" + (f":{labels[index]}" if labels else "")
            for index in top_indices(row, num_classes)
        ]
        for row in rows
    ]
