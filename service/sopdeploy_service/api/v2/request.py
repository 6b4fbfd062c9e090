"""The body of an inference request to the images in it and the outputs it wants.

A body is JSON, or JSON followed by the binary tensors in the order of the inputs; then the header
`Inference-Header-Content-Length` says where the JSON ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from struct import unpack_from
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.api.v2 import request as tensors
from sopdeploy_service.api.v2.metadata import DTYPES, IMAGE, Signature, Tensor
from sopdeploy_service.api.v2.number_text import NumberText, finite, lift, put_back, ragged
from sopdeploy_service.http import strict_json as fields
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.http.strict_json import bad_request, check_length, decode_text, parse

MICROSECONDS = 1e6
LONGEST_NUMBER = 20  # digits; a longer one is no length of anything


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output the client wants: as binary or JSON, its numbers or its *classes* best ones (0: numbers)."""

    tensor: Tensor
    binary: bool
    classes: int


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A valid request: *images*, files to decode or uint8 (n, H, W, 3), and the outputs it wants."""

    id: str | None
    images: list[bytes] | NDArray[np.uint8]
    outputs: tuple[Wanted, ...]
    timeout_seconds: float | None


def read_body(body: bytes, header_length: str | None, signature: Signature, max_json: int) -> InferRequest:
    """Return the request in *body*, whose JSON may have *max_json* bytes; for a thread, not the loop.

    Raises `RefusedError`, status 400 or 413, for whatever is wrong with it.
    """
    text, binary = split(body, header_length)
    check_length(text, max_json)
    rest, lists = lift(text)
    value = parse(rest, max_json)
    put_back(value, lists)
    return read_request(value, binary, signature)


def split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Return the JSON and the binary part of *body*, as the value of the length header says."""
    if header_length is None:
        return body, memoryview(b"")
    number = header_length.strip()
    if not (number.isascii() and number.isdecimal() and len(number) <= LONGEST_NUMBER):
        raise bad_request("bad_header_length", "Inference-Header-Content-Length must be a whole number")
    if int(number) > len(body):
        raise bad_request(
            "bad_header_length",
            f"Inference-Header-Content-Length is {number}, the body has {len(body)} bytes",
        )
    return body[: int(number)], memoryview(body)[int(number) :]


def read_request(value: Any, binary: memoryview, signature: Signature) -> InferRequest:
    """Return the request of the JSON *value* and the *binary* part behind it."""
    if not isinstance(value, dict):
        raise bad_request("malformed_request", "the body must be a JSON object")
    parameters = fields.as_object(value.get("parameters"), "parameters")
    return InferRequest(
        id=fields.as_text(value["id"], "id") if value.get("id") is not None else None,
        images=read_inputs(fields.as_objects(value.get("inputs"), "inputs"), binary, signature),
        outputs=read_outputs(
            fields.as_objects(value.get("outputs"), "outputs"),
            signature,
            binary=fields.as_flag(parameters.get("binary_data_output"), "parameters.binary_data_output"),
        ),
        timeout_seconds=read_timeout(parameters.get("timeout")),
    )


def read_timeout(value: Any) -> float | None:
    """Return the seconds of *value*, microseconds; None and 0 set no time."""
    if value is None:
        return None
    return fields.as_count(value, "parameters.timeout") / MICROSECONDS or None


def read_inputs(
    inputs: Sequence[dict[str, Any]], binary: memoryview, signature: Signature
) -> list[bytes] | NDArray[np.uint8]:
    """Return the images of the one input that is filled."""
    known = tuple(tensor.name for tensor in signature.inputs)
    seen: set[str] = set()
    for item in inputs:
        fields.unique_name(item, "input", known, seen)
    if len(inputs) != 1:
        raise bad_request(
            "missing_input" if not inputs else "too_many_inputs",
            f"give one of the inputs {known[0]!r} ({signature.tensor.datatype} {signature.tensor.wanted}) "
            f"and {known[1]!r} (BYTES [n], encoded images)",
        )
    tensor = next(tensor for tensor in signature.inputs if tensor.name in seen)
    return read_input(inputs[0], binary, tensor, signature.max_images)


def read_input(
    item: dict[str, Any], binary: memoryview, tensor: Tensor, max_images: int
) -> list[bytes] | NDArray[np.uint8]:
    """Return the images in *item*, or in the *binary* part that belongs to it alone."""
    datatype = fields.as_text(item.get("datatype"), f"input {tensor.name!r}: datatype")
    if datatype != tensor.datatype:
        raise bad_request(
            "wrong_datatype",
            f"input {tensor.name!r}: the datatype must be {tensor.datatype}, not {datatype[:20]!r}",
        )
    shape = tensors.read_shape(item.get("shape"), tensor, max_images)
    size = fields.as_object(item.get("parameters"), "input.parameters").get("binary_data_size")
    if (size is None) != ("data" in item):
        raise bad_request(
            "wrong_data",
            f"input {tensor.name!r}: must have either `data` or the parameter `binary_data_size`",
        )
    taken = 0 if size is None else fields.as_count(size, "binary_data_size")
    if taken != len(binary):
        raise bad_request(
            "wrong_binary_size",
            f"{len(binary)} bytes follow the JSON, its inputs speak of {taken}; with binary data the header "
            "Inference-Header-Content-Length says where the JSON ends",
        )
    if tensor is IMAGE:
        if size is None:
            return tensors.images_from_json(item["data"], shape)
        return tensors.images_from_binary(binary, shape)
    if size is None:
        return tensors.numbers_from_json(item["data"], tensor, shape)
    return tensors.numbers_from_binary(binary, tensor, shape)


def read_outputs(
    outputs: Sequence[dict[str, Any]], signature: Signature, *, binary: bool
) -> tuple[Wanted, ...]:
    """Return the outputs asked for; every one, *binary* or not, where none is."""
    if not outputs:
        return tuple(Wanted(tensor, binary, 0) for tensor in signature.outputs)
    by_name = {tensor.name: tensor for tensor in signature.outputs}
    seen: set[str] = set()
    wanted = []
    for item in outputs:
        name = fields.unique_name(item, "output", tuple(by_name), seen)
        asked = fields.as_object(item.get("parameters"), f"output {name!r}: parameters")
        own = asked.get("binary_data", binary)
        classes = asked.get("classification", 0)
        wanted.append(
            Wanted(
                by_name[name],
                fields.as_flag(own, f"output {name!r}: binary_data"),
                fields.as_count(classes, f"output {name!r}: classification"),
            )
        )
    return tuple(wanted)


LENGTH_BYTES = 4  # before every element of BYTES


def read_shape(value: Any, tensor: Tensor, max_images: int) -> tuple[int, ...]:
    """Return the shape in *value* where *tensor* may have it; raises `RefusedError` naming the right one.

    `IMAGE` may be [n] or [n, 1].
    """
    right = f"input {tensor.name!r}: the shape must be {tensor.wanted} with n from 1 to {max_images}"
    if type(value) is not list or not all(type(size) is int for size in value):
        raise bad_request("wrong_shape", right)
    items = {tensor.item, ()} if tensor is IMAGE else {tensor.item}
    if not value or value[0] < 1 or tuple(value[1:]) not in items:
        raise bad_request("wrong_shape", f"{right}, not {str(value)[:100]}")
    if value[0] > max_images:
        raise bad_request("too_many_images", f"{right}, the limit of this server")
    return tuple(value)


def numbers_from_binary(raw: memoryview, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array of *shape* that lies row by row in *raw*, little-endian."""
    dtype = DTYPES[tensor.datatype]
    wanted = prod(shape) * dtype.itemsize
    if len(raw) != wanted:
        raise bad_request(
            "wrong_binary_size",
            f"input {tensor.name!r}: {list(shape)} {tensor.datatype} is {wanted} bytes, not {len(raw)}",
        )
    return finite(np.frombuffer(raw, dtype).reshape(shape), tensor)


def numbers_from_json(data: Any, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array of *shape* that *data* lists, flat or nested."""
    if not isinstance(data, NumberText):
        kind = "whole numbers" if DTYPES[tensor.datatype].kind in "iu" else "numbers"
        raise bad_request("wrong_data", f"input {tensor.name!r}: data must be a list of {kind}")
    return data.read(tensor, shape)


def images_from_json(data: Any, shape: tuple[int, ...]) -> list[bytes]:
    """Return the image files that *data* lists as base64, flat or each in a list of its own."""
    texts = data if isinstance(data, list) else []
    if len(shape) == 2 and all(isinstance(text, list) and len(text) == 1 for text in texts):
        texts = [text[0] for text in texts]
    if len(texts) != shape[0]:
        raise ragged(IMAGE, shape)
    return [decode_text(text, f"input 'IMAGE'[{place}]") for place, text in enumerate(texts)]


def images_from_binary(raw: memoryview, shape: tuple[int, ...]) -> list[bytes]:
    """Return the image files in *raw*: each 4 bytes of length, little-endian, and so many bytes."""
    images = []
    place = 0
    for number in range(prod(shape)):
        end = place + LENGTH_BYTES
        length = unpack_from("<I", raw, place)[0] if end <= len(raw) else 0
        if end + length > len(raw):
            raise wrong_length(f"element {number} does not fit into its {len(raw)} bytes")
        images.append(bytes(raw[end : end + length]))
        place = end + length
    if place != len(raw):
        raise wrong_length(f"{len(raw) - place} bytes are left over after element {prod(shape) - 1}")
    return images


def wrong_length(what: str) -> RejectedError:
    """Return the error of BYTES whose lengths do not add up."""
    return bad_request("wrong_binary_size", f"input 'IMAGE': {what}")
