"""Parse the body of an inference request: JSON, or JSON followed by binary tensors.

Binary tensors follow in the order of the inputs; the header `Inference-Header-Content-Length` is the length
of the JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from struct import unpack_from
from typing import Annotated, Any

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt

from sopdeploy.bundle.manifest import EMBEDDING, Manifest, TensorRecord
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import decode_text, parse_json
from sopdeploy_service.inference.results import RejectedError

MICROSECONDS = 1e6
MAX_DIGITS = 20  # of the header; `int` rejects thousands of digits
IMAGE_INPUT = "IMAGE"  # the input for encoded files; a request gives either it or the input of the bundle
UINT8, BYTES = "UINT8", "BYTES"  # datatypes of the bundle's input and of encoded files
FP32 = "FP32"  # datatype of all outputs; clients that compute in floating point also send pixels in it
PIXELS_ONLY = (
    "values must be whole numbers from 0 to 255: send pixels before any scaling and normalization, "
    "which are part of the network, and round the result of a resize"
)
LENGTH_BYTES = 4  # before every element of a binary BYTES tensor

Text = Annotated[str, Field(max_length=1000)]


class Body(pydantic.BaseModel):
    """A JSON object whose unknown keys are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


class InputParameters(Body):
    """Parameters of an input."""

    binary_data_size: NonNegativeInt | None = None


class InputTensor(Body):
    """One input: `data` in JSON, or `binary_data_size` bytes after the JSON."""

    name: Text
    datatype: Text
    shape: Annotated[list[int], Field(max_length=16)]
    parameters: InputParameters = InputParameters()
    data: Any = None  # row by row, flat or nested, which `_elements` checks; BYTES as base64


class OutputParameters(Body):
    """Parameters of an output."""

    binary_data: bool | None = None
    classification: NonNegativeInt = 0  # an extension of Triton, which `/v1/classify` replaces


class RequestedOutput(Body):
    """One requested output."""

    name: Text
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Body):
    """Parameters of a request; `timeout` is in microseconds."""

    binary_data_output: bool | None = None
    timeout: NonNegativeInt | None = None


class InferBody(Body):
    """The JSON of an inference request."""

    id: Text | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[InputTensor], Field(max_length=16)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=100)] = []


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A valid request: *images* are encoded files or uint8 (n, H, W, 3).

    *outputs* has the names of the requested outputs, and whether each is returned in binary or in JSON.
    """

    id: str | None
    images: list[bytes] | NDArray[np.uint8]
    outputs: dict[str, bool]
    timeout_seconds: float | None


def parse_body(
    body: bytes, header_length: str | None, manifest: Manifest, max_images: int, max_json: int
) -> InferRequest:
    """Parse *body*, in a thread; raises `RejectedError` if it is invalid or has too many images or bytes."""
    text, binary = body, memoryview(b"")  # without the header, all of it is JSON
    if header_length is not None:
        digits = header_length.strip()
        is_number = digits.isascii() and digits.isdecimal() and len(digits) <= MAX_DIGITS
        if not is_number or int(digits) > len(body):
            message = f"Inference-Header-Content-Length must be a number of bytes, at most {len(body)}"
            raise bad_request("bad_header_length", message)
        text, binary = body[: int(digits)], memoryview(body)[int(digits) :]
    record = manifest.inputs[0]
    values_per_image = prod(size or 1 for size in record.shape)  # None is the number of images
    request = parse_json(InferBody, text, max_json, max_images * values_per_image)
    timeout = request.parameters.timeout
    return InferRequest(
        id=request.id,
        images=_read_images(request.inputs, binary, record, max_images),
        outputs=_requested_outputs(request, [output.name for output in manifest.outputs]),
        timeout_seconds=timeout / MICROSECONDS if timeout else None,  # 0 means none
    )


def _requested_outputs(request: InferBody, names: Sequence[str]) -> dict[str, bool]:
    """Map each output to return, by default all of *names* but the embedding, to whether it is in binary."""
    binary_by_default = bool(request.parameters.binary_data_output)  # of outputs that choose no format
    requested: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in names:
            message = f"no output {output.name[:100]!r}; available: {', '.join(names)}"
            raise bad_request("unknown_output", message)
        if output.name in requested:
            raise bad_request("duplicate_output", f"output {output.name!r} occurs twice")
        if output.parameters.classification:
            message = "outputs are numbers; omit class_count (`classification`), or use /v1/classify"
            raise bad_request("no_classification", message)
        chosen = output.parameters.binary_data
        requested[output.name] = binary_by_default if chosen is None else chosen
    return requested or {name: binary_by_default for name in names if name != EMBEDDING}


def _read_images(
    inputs: Sequence[InputTensor], binary: memoryview, record: TensorRecord, max_images: int
) -> list[bytes] | NDArray[np.uint8]:
    """Return the images of the only input, `IMAGE` or that of *record*, from its JSON or from *binary*."""
    if len(inputs) != 1 or inputs[0].name not in {record.name, IMAGE_INPUT}:
        raise bad_request(
            "wrong_inputs",
            f"give one of the inputs {record.name!r} ({UINT8} {_describe(record.shape[1:])}) and "
            f"{IMAGE_INPUT!r} ({BYTES} [n], encoded images)",
        )
    item = inputs[0]
    is_encoded = item.name == IMAGE_INPUT
    allowed = (BYTES,) if is_encoded else (UINT8, FP32)
    if item.datatype not in allowed:
        message = f"the datatype must be {' or '.join(allowed)}, not {item.datatype[:20]!r}"
        raise _invalid("wrong_datatype", item, message)
    size = (1,) if is_encoded else record.shape[1:]  # encoded images are [n, 1] or [n]
    shape = _check_shape(item, size, max_images)
    declared = item.parameters.binary_data_size
    if (declared is None) == (item.data is None):  # the input has neither or both
        raise _invalid("wrong_data", item, "must have either `data` or the parameter `binary_data_size`")
    if len(binary) != (declared or 0):
        raise bad_request(
            "wrong_binary_size",
            f"{len(binary)} bytes follow the JSON, but its inputs declare {declared or 0}; with binary data "
            "the header Inference-Header-Content-Length must be the length of the JSON",
        )
    if declared is None:
        if not is_encoded:
            return _pixels_from_json(item, shape)
        return [decode_text(text, f"input 'IMAGE'[{i}]") for i, text in enumerate(_elements(item, shape))]
    return _split_elements(item, binary, shape[0]) if is_encoded else _pixels_from_binary(item, binary, shape)


def _invalid(code: str, item: InputTensor, message: str) -> RejectedError:
    return bad_request(code, f"input {item.name!r}: {message}")


def _describe(size: Sequence[int | None]) -> str:
    """Describe the shape of images of *size* for error messages: `[n, 224, 224, 3]`."""
    return "[" + ", ".join(["n", *map(str, size)]) + "]"


def _check_shape(item: InputTensor, size: tuple[int | None, ...], max_images: int) -> tuple[int, ...]:
    """Return the shape of *item* if it is [n, *size], or [n] for `IMAGE`; else raise `RejectedError`."""
    shape = item.shape
    rule = f"the shape must be {_describe(size)} with n from 1 to {max_images}"
    allowed_sizes = {size, ()} if item.name == IMAGE_INPUT else {size}
    if not shape or shape[0] < 1 or tuple(shape[1:]) not in allowed_sizes:
        raise _invalid("wrong_shape", item, f"{rule}, not {str(shape)[:100]}")
    if shape[0] > max_images:
        raise _invalid("too_many_images", item, f"{rule}, the limit of this server")
    return tuple(shape)


def _pixels_from_json(item: InputTensor, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Convert the numbers in the data of *item* to an array of *shape*."""
    numbers = _elements(item, shape)
    if not set(map(type, numbers)) <= {int, float}:  # of a text, NumPy would give its length to all elements
        raise _invalid("wrong_data", item, PIXELS_ONLY)
    return _as_pixels(item, np.array(numbers, np.float64).reshape(shape))


def _elements(item: InputTensor, shape: tuple[int, ...]) -> list[Any]:
    """Return the elements of the data of *item*, a list that is flat or nested like *shape*."""
    rows = [item.data]
    for size in shape:
        if set(map(type, rows)) != {list} or set(map(len, rows)) != {size}:
            break  # *data* is not nested like *shape*
        rows = list(chain.from_iterable(rows))
    else:
        return rows
    if not isinstance(item.data, list) or len(item.data) != prod(shape):
        needed = f"shape {list(shape)} needs {prod(shape)} elements in `data`, flat or nested like the shape"
        raise _invalid("wrong_data", item, needed)
    return item.data


def _pixels_from_binary(item: InputTensor, raw: memoryview, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Convert *raw*, the numbers of *item* in its datatype, to an array of *shape*."""
    dtype = np.dtype("<f4" if item.datatype == FP32 else np.uint8)
    needed = prod(shape) * dtype.itemsize
    if len(raw) != needed:
        message = f"{list(shape)} {item.datatype} is {needed} bytes, not {len(raw)}"
        raise _invalid("wrong_binary_size", item, message)
    return _as_pixels(item, np.frombuffer(raw, dtype).reshape(shape))


def _as_pixels(item: InputTensor, values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert *values* to uint8; raise `RejectedError` unless they are whole numbers from 0 to 255."""
    with np.errstate(invalid="ignore"):  # NaN and numbers above 255, which the comparison finds
        pixels = values.astype(np.uint8, copy=False)
    if not np.array_equal(pixels, values):
        raise _invalid("wrong_data", item, PIXELS_ONLY)
    return pixels


def _split_elements(item: InputTensor, raw: memoryview, count: int) -> list[bytes]:
    """Split a BYTES tensor: each of *count* elements is its length, 4 bytes little-endian, and its bytes."""
    elements, position = [], 0
    for number in range(count):
        begin = position + LENGTH_BYTES
        end = None if begin > len(raw) else begin + unpack_from("<I", raw, position)[0]
        if end is None or end > len(raw):
            message = f"element {number} does not fit into {len(raw)} bytes"
            raise _invalid("wrong_binary_size", item, message)
        elements.append(bytes(raw[begin:end]))
        position = end
    if position != len(raw):
        message = f"{len(raw) - position} bytes remain after element {count - 1}"
        raise _invalid("wrong_binary_size", item, message)
    return elements
