"""The outputs of a request to its answer: JSON, or JSON followed by binary tensors; numbers or classes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from struct import pack
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response
from numpy.typing import NDArray

from sopdeploy_service.api.upload import (
    admit,
    context_of,
    parsing,
    raise_if_rejected,
    read_body,
    service_of,
)
from sopdeploy_service.api.v2.metadata import DTYPES, Signature
from sopdeploy_service.api.v2.request import InferRequest, Wanted
from sopdeploy_service.api.v2.request import read_body as parse_body
from sopdeploy_service.http.disconnect import cancel_on_disconnect
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import Outcome, Prediction, Rejection, top_indices
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability.request_context import RequestContext

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
        [
            f"{row[place]!s}:{place}" + (f":{labels[place]}" if labels else "")
            for place in top_indices(row, classes)
        ]
        for row in rows
    ]


def element(text: str) -> bytes:
    """Return *text* as an element of a binary BYTES tensor: its length, 4 bytes little-endian, and itself."""
    raw = text.encode()
    return pack("<I", len(raw)) + raw


async def answer_infer(request: Request, name: str, version: str | None) -> Response:
    """Return the outputs that *request* asks of the model; raises `RefusedError` where there are none."""
    service = service_of(request)
    started = time.monotonic()
    model, deadline = admit(request, name, version)
    signature = Signature.of(model.bundle, service.settings.max_images)
    context = context_of(request)
    with model.in_use():  # from its admission on: while a slow body comes, the model may be replaced twice
        asked = await receive(request, service, model, signature, deadline)
        received = time.monotonic()
        service.metrics.stage("receive", received - started)
        context.record_stage("receive", received - started, received)
        if asked.timeout_seconds is not None:
            deadline = min(deadline, started + asked.timeout_seconds)
        work = run(service, model, asked, deadline, context)
        outcomes = raise_if_rejected(await cancel_on_disconnect(work, request.receive))
    head = {"model_name": model.name, "model_version": model.version}
    if asked.id is not None:
        head = {"id": asked.id, **head}
    labels = {signature.outputs[0].name: model.labels}
    body, headers = write_answer(head, stacked(outcomes), asked.outputs, labels)
    return Response(body, headers={**headers, "Server-Timing": context.server_timing()})


async def receive(
    request: Request, service: Service, model: Model, signature: Signature, deadline: float
) -> InferRequest:
    """Return the request in the body; it is read in a thread, a large JSON would hold up the event loop."""
    settings = service.settings
    body = await read_body(request, settings.max_body_bytes, deadline)
    header = request.headers.get(HEADER_LENGTH)
    async with parsing(service, model, deadline):
        return await service.parse(parse_body, body, header, signature, settings.max_json_bytes)


async def run(
    service: Service, model: Model, asked: InferRequest, deadline: float, context: RequestContext
) -> list[Outcome] | Rejection:
    """Return the outcome of each image of *asked*, decoding those that are files."""
    if isinstance(asked.images, list):
        return await service.infer(model, [EncodedImage(image) for image in asked.images], deadline, context)
    return await service.infer(model, asked.images, deadline, context)


def stacked(outcomes: Sequence[Outcome]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs (n, ...) of all images by name.

    The protocol has one status for a request, so the first refused image, named by its index, refuses it.
    """
    answered: list[Prediction] = []
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, Rejection):
            raise RejectedError(replace(outcome, message=f"image {place}: {outcome.message}"))
        answered.append(outcome)
    return {name: np.stack([one.outputs[name] for one in answered]) for name in answered[0].outputs}
