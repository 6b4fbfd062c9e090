"""The outputs of a request to its answer: JSON, or JSON followed by binary tensors; numbers or classes."""

from collections.abc import Mapping, Sequence
from struct import pack
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sopdeploy_service.ranking import best
from sopdeploy_service.v2.request import Wanted
from sopdeploy_service.v2.signature import DTYPES

HEADER_LENGTH = "Inference-Header-Content-Length"


def write_answer(
    head: Mapping[str, Any],
    outputs: Mapping[str, NDArray[Any]],
    wanted: Sequence[Wanted],
    labels: Mapping[str, Sequence[str]],
) -> tuple[bytes, dict[str, str]]:
    """Return the body that says *head* (id, model) and the *wanted* of *outputs* (n, ...), and its headers.

    *labels* are the names of the classes, in order, of the outputs that have such.
    """
    parts: list[bytes] = []
    described = [
        describe(want, outputs[want.tensor.name], labels.get(want.tensor.name, ()), parts) for want in wanted
    ]
    text = orjson.dumps({**head, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(want.binary for want in wanted):
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *parts]), headers


def describe(want: Wanted, values: NDArray[Any], labels: Sequence[str], parts: list[bytes]) -> dict[str, Any]:
    """Return the JSON of one output; where it is binary its bytes are added to *parts*."""
    if want.classes:
        rows = classify(values, want.classes, labels)
        texts = [text for row in rows for text in row]
        shape, datatype = [len(rows), len(rows[0])], "BYTES"
        raw = b"".join(element(text) for text in texts) if want.binary else b""
        data: Any = texts
    else:
        numbers = np.ascontiguousarray(values, DTYPES[want.tensor.datatype])
        shape, datatype = list(values.shape), want.tensor.datatype
        raw = numbers.tobytes() if want.binary else b""
        data = numbers.reshape(-1)
    said: dict[str, Any] = {"name": want.tensor.name, "datatype": datatype, "shape": shape}
    if not want.binary:
        return {**said, "data": data}
    parts.append(raw)
    return {**said, "parameters": {"binary_data_size": len(raw)}}


def classify(values: NDArray[Any], classes: int, labels: Sequence[str]) -> list[list[str]]:
    """Return for each of *values* (n, ...) its largest as `value:index:label`, the largest first.

    The value is the shortest text that reads back as the same float32, as Triton's is since it prints all
    digits; equal values keep the order of the labels, as in `/v1/classify`.
    """
    rows = values.reshape(len(values), -1)
    return [
        [f"{row[place]!s}:{place}" + (f":{labels[place]}" if labels else "") for place in best(row, classes)]
        for row in rows
    ]


def element(text: str) -> bytes:
    """Return *text* as an element of a binary BYTES tensor: its length, 4 bytes little-endian, and itself."""
    raw = text.encode()
    return pack("<I", len(raw)) + raw
