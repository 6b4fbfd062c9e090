"""Parse the body of an inference request: JSON, or JSON followed by binary tensors.

Binary tensors follow in the order of the inputs; the header `Inference-Header-Content-Length` is the length
of the JSON.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from struct import unpack_from
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, WithJsonSchema

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy_service.api.v2.metadata import IMAGE, Signature, Tensor
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import decode_text, parse, validate
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.results import RejectedError

MICROSECONDS = 1e6
MAX_DIGITS = 20  # of the header; `int` rejects thousands of digits
SHAPE_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 1}}
FLOAT_PIXELS = "FP32"  # what clients that compute in floating point send instead of UINT8
PIXELS_ONLY = (
    "values must be whole numbers from 0 to 255: send pixels before any scaling and normalization, "
    "which are part of the network, and round the result of a resize"
)
LENGTH_BYTES = 4  # before every element of a binary BYTES tensor


class Body(pydantic.BaseModel):
    """A JSON object whose unknown keys are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


class InputParameters(Body):
    """Parameters of an input."""

    binary_data_size: NonNegativeInt | None = None


class InputTensor(Body):
    """One input: `data` in JSON, or `binary_data_size` bytes after the JSON."""

    model_config = pydantic.ConfigDict(json_schema_extra={"required": ["name", "datatype", "shape"]})

    name: str = Field(description="the bundle's input, or `IMAGE` for encoded images")
    datatype: str = Field(json_schema_extra={"enum": ["UINT8", FLOAT_PIXELS, "BYTES"]})
    # `shape` and `data` are checked against the tensor, with error codes of their own.
    shape: Annotated[Any, WithJsonSchema(SHAPE_SCHEMA)] = None
    parameters: InputParameters | None = None
    data: Annotated[Any, WithJsonSchema({"type": "array", "items": {}})] = Field(
        None, description="row by row, flat or nested; BYTES as base64"
    )


class OutputParameters(Body):
    """Parameters of an output; `classification` requests that many classes."""

    binary_data: bool | None = None
    classification: NonNegativeInt = 0


class OutputTensor(Body):
    """One requested output."""

    name: str
    parameters: OutputParameters | None = None


class RequestParameters(Body):
    """Parameters of a request; `timeout` is in microseconds."""

    binary_data_output: bool | None = None
    timeout: NonNegativeInt | None = None


class InferBody(Body):
    """The JSON of an inference request."""

    model_config = pydantic.ConfigDict(json_schema_extra={"required": ["inputs"]})

    id: str | None = None
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] | None = None
    outputs: list[OutputTensor] | None = None


class RequestedOutput(NamedTuple):
    """An output to return: its numbers if *num_classes* is 0, or that many of its best classes."""

    tensor: Tensor
    binary: bool
    num_classes: int


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A valid request: *images* are encoded files or uint8 (n, H, W, 3)."""

    id: str | None
    images: list[EncodedImage] | NDArray[np.uint8]
    outputs: tuple[RequestedOutput, ...]
    timeout_seconds: float | None


def parse_body(body: bytes, header_length: str | None, signature: Signature, max_json: int) -> InferRequest:
    """Parse *body*, with at most *max_json* bytes of JSON; call it in a thread.

    Raises `RejectedError` with status 400 or 413.
    """
    text, binary = body, memoryview(b"")
    if header_length is not None:
        digits = header_length.strip()
        is_number = digits.isascii() and digits.isdecimal() and len(digits) <= MAX_DIGITS
        if not is_number or int(digits) > len(body):
            message = f"Inference-Header-Content-Length must be a number of bytes, at most {len(body)}"
            raise bad_request("bad_header_length", message)
        text, binary = body[: int(digits)], memoryview(body)[int(digits) :]
    request = validate(InferBody, parse(text, max_json, max_structure=max_json))
    parameters = request.parameters or RequestParameters()
    return InferRequest(
        id=request.id,
        images=_read_images(request.inputs or [], binary, signature),
        outputs=_requested_outputs(
            request.outputs or [], signature, binary=bool(parameters.binary_data_output)
        ),
        timeout_seconds=(parameters.timeout or 0) / MICROSECONDS or None,
    )


def _check_names(what: str, names: Iterable[str], known: Mapping[str, Tensor]) -> None:
    """Raise `RejectedError` for a name that is unknown or occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name not in known:
            message = f"no {what} {name[:100]!r}; available: {', '.join(known)}"
            raise bad_request(f"unknown_{what}", message)
        if name in seen:
            raise bad_request(f"duplicate_{what}", f"{what} {name!r} occurs twice")
        seen.add(name)


def _requested_outputs(
    outputs: Sequence[OutputTensor], signature: Signature, *, binary: bool
) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs, or all except the embedding if none is requested.

    *binary* is the format of outputs that do not choose one.
    """
    known = {tensor.name: tensor for tensor in signature.outputs}
    _check_names("output", (output.name for output in outputs), known)
    requested = []
    for output in outputs:
        parameters = output.parameters or OutputParameters()
        as_binary = binary if parameters.binary_data is None else parameters.binary_data
        requested.append(RequestedOutput(known[output.name], as_binary, parameters.classification))
    by_default = (tensor for tensor in signature.outputs if tensor.name != EMBEDDING)
    return tuple(requested) or tuple(RequestedOutput(tensor, binary, 0) for tensor in by_default)


def _read_images(
    inputs: Sequence[InputTensor], binary: memoryview, signature: Signature
) -> list[EncodedImage] | NDArray[np.uint8]:
    """Return the images of the only input, from its JSON or from *binary*."""
    known = {tensor.name: tensor for tensor in (signature.tensor, IMAGE)}
    _check_names("input", (item.name for item in inputs), known)
    if len(inputs) != 1:
        raise bad_request(
            "missing_input" if not inputs else "too_many_inputs",
            f"give one of the inputs {signature.tensor.name!r} "
            f"({signature.tensor.datatype} {signature.tensor.expected_shape}) and 'IMAGE' "
            "(BYTES [n], encoded images)",
        )
    item, tensor = inputs[0], known[inputs[0].name]
    allowed = (tensor.datatype,) if tensor is IMAGE else (tensor.datatype, FLOAT_PIXELS)
    if item.datatype not in allowed:
        message = f"the datatype must be {' or '.join(allowed)}, not {item.datatype[:20]!r}"
        raise _invalid("wrong_datatype", tensor, message)
    shape = _check_shape(item.shape, tensor, signature.max_images)
    size = item.parameters.binary_data_size if item.parameters else None
    if (size is None) != ("data" in item.model_fields_set):
        raise _invalid("wrong_data", tensor, "must have either `data` or the parameter `binary_data_size`")
    if len(binary) != (size or 0):
        raise bad_request(
            "wrong_binary_size",
            f"{len(binary)} bytes follow the JSON, but its inputs declare {size or 0}; with binary data the "
            "header Inference-Header-Content-Length must be the length of the JSON",
        )
    if tensor is IMAGE:
        files = _split_elements(binary, shape[0]) if size is not None else _decode_texts(item.data, shape)
        return [EncodedImage(file) for file in files]
    if size is None:
        return _pixels_from_json(item, tensor, shape)
    dtype = np.dtype("<f4" if item.datatype == FLOAT_PIXELS else np.uint8)
    needed = prod(shape) * dtype.itemsize
    if size != needed:
        message = f"{list(shape)} {item.datatype} is {needed} bytes, not {size}"
        raise _invalid("wrong_binary_size", tensor, message)
    return _as_pixels(np.frombuffer(binary, dtype).reshape(shape), tensor)


def _invalid(code: str, tensor: Tensor, message: str) -> RejectedError:
    return bad_request(code, f"input {tensor.name!r}: {message}")


def _check_shape(value: Any, tensor: Tensor, max_images: int) -> tuple[int, ...]:
    """Return the shape *value* if *tensor* may have it; `IMAGE` may be [n] or [n, 1]."""
    rule = f"the shape must be {tensor.expected_shape} with n from 1 to {max_images}"
    if type(value) is not list or not all(type(size) is int for size in value):
        raise _invalid("wrong_shape", tensor, rule)
    allowed = {tensor.shape[1:], ()} if tensor is IMAGE else {tensor.shape[1:]}
    if not value or value[0] < 1 or tuple(value[1:]) not in allowed:
        raise _invalid("wrong_shape", tensor, f"{rule}, not {str(value)[:100]}")
    if value[0] > max_images:
        raise _invalid("too_many_images", tensor, f"{rule}, the limit of this server")
    return tuple(value)


def _pixels_from_json(item: InputTensor, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Convert the data of *item*, numbers in a list that is flat or nested like *shape*, to that shape."""
    numbers = item.data if isinstance(item.data, list) else []
    if isinstance(next(iter(numbers), None), list):
        for size in shape[1:]:
            if not all(isinstance(row, list) and len(row) == size for row in numbers):
                raise _invalid("wrong_data", tensor, _wrong_count(shape))
            numbers = list(chain.from_iterable(numbers))
    if len(numbers) != prod(shape):
        raise _invalid("wrong_data", tensor, _wrong_count(shape))
    if not set(map(type, numbers)) <= ({int, float} if item.datatype == FLOAT_PIXELS else {int}):
        raise _invalid("wrong_data", tensor, PIXELS_ONLY)
    return _as_pixels(np.array(numbers, np.float64).reshape(shape), tensor)


def _as_pixels(values: NDArray[Any], tensor: Tensor) -> NDArray[np.uint8]:
    """Convert *values* to uint8; raise `RejectedError` unless they are whole numbers from 0 to 255."""
    with np.errstate(invalid="ignore"):  # NaN and numbers above 255, which the comparison finds
        pixels = values.astype(np.uint8, copy=False)
    if not np.array_equal(pixels, values):
        raise _invalid("wrong_data", tensor, PIXELS_ONLY)
    return pixels


def _wrong_count(shape: tuple[int, ...]) -> str:
    return f"shape {list(shape)} needs {prod(shape)} elements in `data`, flat or nested like the shape"


def _decode_texts(data: Any, shape: tuple[int, ...]) -> list[bytes]:
    """Decode a list of base64 texts, flat or each in its own list."""
    texts = data if isinstance(data, list) else []
    if len(shape) == 2 and all(isinstance(text, list) and len(text) == 1 for text in texts):
        texts = [text[0] for text in texts]
    if len(texts) != shape[0]:
        raise _invalid("wrong_data", IMAGE, _wrong_count(shape))
    return [decode_text(text, f"input 'IMAGE'[{index}]") for index, text in enumerate(texts)]


def _split_elements(raw: memoryview, count: int) -> list[bytes]:
    """Split a BYTES tensor: each of *count* elements is its length, 4 bytes little-endian, and its bytes."""
    elements, position = [], 0
    for number in range(count):
        begin = position + LENGTH_BYTES
        length = unpack_from("<I", raw, position)[0] if begin <= len(raw) else 0
        position = begin + length
        if position > len(raw):
            message = f"element {number} does not fit into {len(raw)} bytes"
            raise _invalid("wrong_binary_size", IMAGE, message)
        elements.append(bytes(raw[begin:position]))
    if position != len(raw):
        message = f"{len(raw) - position} bytes remain after element {count - 1}"
        raise _invalid("wrong_binary_size", IMAGE, message)
    return elements
