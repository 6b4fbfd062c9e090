"""Parse the body of an inference request: JSON, or JSON followed by binary tensors.

Binary tensors follow in the order of the inputs; the header `Inference-Header-Content-Length`
is the length of the JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
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
# The input for encoded files; a request gives either it or the input of the bundle.
IMAGE_INPUT = "IMAGE"
UINT8 = "UINT8"  # datatype of the bundle's input
BYTES = "BYTES"  # datatype of encoded files
# Datatype of all outputs; clients that compute in floating point also send pixels in it.
FP32 = "FP32"
PIXELS_ONLY = (
    "values must be whole numbers from 0 to 255: send pixels before any scaling and normalization, "
    "which are part of the network, and round the result of a resize"
)
LENGTH_BYTES = 4  # before every element of a binary BYTES tensor

Text = Annotated[str, Field(max_length=1000)]


class JsonObject(pydantic.BaseModel):
    """A JSON object whose unknown keys are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


class InputParameters(JsonObject):
    """Parameters of an input."""

    binary_data_size: NonNegativeInt | None = None


class InputTensor(JsonObject):
    """One input: `data` in JSON, or `binary_data_size` bytes after the JSON."""

    name: Text
    datatype: Text
    shape: Annotated[list[int], Field(max_length=16)]
    parameters: InputParameters = InputParameters()
    data: Any = None  # row by row, flat or nested, which `_elements` checks; BYTES as base64


class OutputParameters(JsonObject):
    """Parameters of an output."""

    binary_data: bool | None = None
    classification: NonNegativeInt = 0  # an extension of Triton, which `/v1/classify` replaces


class RequestedOutput(JsonObject):
    """One requested output."""

    name: Text
    parameters: OutputParameters = OutputParameters()


class RequestParameters(JsonObject):
    """Parameters of a request; `timeout` is in microseconds."""

    binary_data_output: bool | None = None
    timeout: NonNegativeInt | None = None


class InferBody(JsonObject):
    """The JSON of an inference request."""

    id: Text | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[InputTensor], Field(max_length=16)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=100)] = []


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A valid request: *images* are encoded files or uint8 (n, H, W, 3).

    *is_binary* maps the name of each output to return to whether it is returned in binary or in
    JSON.
    """

    id: str | None
    images: list[bytes] | NDArray[np.uint8]
    is_binary: dict[str, bool]
    timeout_seconds: float | None


def parse_body(
    body: bytes,
    json_length_header: str | None,
    manifest: Manifest,
    max_images: int,
    max_json: int,
) -> InferRequest:
    """Parse *body*; raises `RejectedError` if it is invalid or has too many images or bytes.

    *json_length_header* is the header Inference-Header-Content-Length: the length of the JSON in
    bytes, behind which binary data follow. None says that all of *body* is JSON. Runs in one of
    the threads that parse.
    """
    # Find the end of the JSON, behind which binary data may follow.
    json_length = len(body)  # without the header, all of it is JSON
    if json_length_header is not None:
        digits = json_length_header.strip()
        is_number = digits.isascii() and digits.isdecimal() and len(digits) <= MAX_DIGITS
        if not is_number or int(digits) > len(body):
            message = f"Inference-Header-Content-Length must be a number of bytes, at most {len(body)}"
            raise bad_request("bad_header_length", message)
        json_length = int(digits)

    # Parse the JSON, and the inputs from it or from the binary data.
    pixel_input = manifest.inputs[0]
    # In the shape, None stands for the number of images.
    values_per_image = prod(size or 1 for size in pixel_input.shape)

    request = parse_json(InferBody, body[:json_length], max_json, max_images * values_per_image)
    timeout = request.parameters.timeout

    return InferRequest(
        id=request.id,
        images=_read_images(
            request.inputs, memoryview(body)[json_length:], pixel_input, max_images
        ),
        is_binary=_choose_formats(request, [output.name for output in manifest.outputs]),
        timeout_seconds=timeout / MICROSECONDS if timeout else None,  # 0 means none
    )


def _choose_formats(request: InferBody, names: Sequence[str]) -> dict[str, bool]:
    """Map the name of each output to return to whether it is in binary.

    By default, these are all of *names* but the embedding. Raises `RejectedError` for an output
    that is unknown, occurs twice or is to be classified.
    """
    # The format of outputs that choose none.
    binary_by_default = bool(request.parameters.binary_data_output)
    is_binary: dict[str, bool] = {}

    for output in request.outputs:
        if output.name not in names:
            message = f"no output {output.name[:100]!r}; available: {', '.join(names)}"
            raise bad_request("unknown_output", message)

        if output.name in is_binary:
            raise bad_request("duplicate_output", f"output {output.name!r} occurs twice")

        if output.parameters.classification:
            message = (
                "outputs are numbers; omit class_count (`classification`), or use /v1/classify"
            )
            raise bad_request("no_classification", message)
        chosen = output.parameters.binary_data
        is_binary[output.name] = binary_by_default if chosen is None else chosen
    return is_binary or {name: binary_by_default for name in names if name != EMBEDDING}


def _read_images(
    inputs: Sequence[InputTensor],
    binary: memoryview,
    pixel_input: TensorRecord,
    max_images: int,
) -> list[bytes] | NDArray[np.uint8]:
    """Return the images of the only input, `IMAGE` or *pixel_input*, from its JSON or from *binary*."""
    # The only input is a tensor of pixels or a list of encoded images.
    if len(inputs) != 1 or inputs[0].name not in {pixel_input.name, IMAGE_INPUT}:
        raise bad_request(
            "wrong_inputs",
            f"give one of the inputs {pixel_input.name!r} ({UINT8} {_describe(pixel_input.shape[1:])}) and "
            f"{IMAGE_INPUT!r} ({BYTES} [n], encoded images)",
        )

    tensor = inputs[0]
    is_encoded = tensor.name == IMAGE_INPUT
    datatypes = (BYTES,) if is_encoded else (UINT8, FP32)

    if tensor.datatype not in datatypes:
        message = f"the datatype must be {' or '.join(datatypes)}, not {tensor.datatype[:20]!r}"
        raise _invalid("wrong_datatype", tensor, message)

    # Its shape begins with the number of images.
    shape = tuple(tensor.shape)
    image_shapes = [(1,), ()] if is_encoded else [pixel_input.shape[1:]]
    rule = f"the shape must be {_describe(image_shapes[0])} with n from 1 to {max_images}"

    if not shape or shape[0] < 1 or shape[1:] not in image_shapes:
        raise _invalid("wrong_shape", tensor, f"{rule}, not {str(tensor.shape)[:100]}")

    if shape[0] > max_images:
        raise _invalid("too_many_images", tensor, f"{rule}, the limit of this server")

    # Its data are in the JSON or behind it, as long as declared.
    declared = tensor.parameters.binary_data_size
    if (declared is None) == (tensor.data is None):  # the input has neither or both
        raise _invalid(
            "wrong_data", tensor, "must have either `data` or the parameter `binary_data_size`"
        )

    if len(binary) != (declared or 0):
        raise bad_request(
            "wrong_binary_size",
            f"{len(binary)} bytes follow the JSON, but its inputs declare {declared or 0}; with binary data "
            "the header Inference-Header-Content-Length must be the length of the JSON",
        )

    # Read the images.
    if not is_encoded:
        return _read_pixels(tensor, binary, shape)

    if tensor.data is None:
        return _split_elements(tensor, binary, shape[0])
    return [
        decode_text(text, f"input 'IMAGE'[{i}]")
        for i, text in enumerate(_elements(tensor, shape))
    ]


def _invalid(code: str, tensor: InputTensor, message: str) -> RejectedError:
    return bad_request(code, f"input {tensor.name!r}: {message}")


def _describe(image_shape: Sequence[int | None]) -> str:
    """Describe the shape of n images of *image_shape* for error messages: `[n, 224, 224, 3]`."""
    return "[" + ", ".join(["n", *map(str, image_shape)]) + "]"


def _read_pixels(
    tensor: InputTensor, binary: memoryview, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Convert the numbers of *tensor*, in its JSON or else in *binary*, to uint8 of *shape*.

    Raises `RejectedError` unless there are as many as *shape* needs, all whole and from 0 to
    255.
    """
    # Read the numbers.
    values: NDArray[Any]
    if tensor.data is None:
        dtype = np.dtype("<f4" if tensor.datatype == FP32 else np.uint8)
        needed = prod(shape) * dtype.itemsize

        if len(binary) != needed:
            message = f"{list(shape)} {tensor.datatype} is {needed} bytes, not {len(binary)}"
            raise _invalid("wrong_binary_size", tensor, message)

        values = np.frombuffer(binary, dtype)
    else:
        numbers = _elements(tensor, shape)
        # NumPy would convert texts and truth values, too.
        if not set(map(type, numbers)) <= {int, float}:
            raise _invalid("wrong_data", tensor, PIXELS_ONLY)
        values = np.array(numbers, np.float64)

    # Convert them to pixels, if nothing is lost.
    with np.errstate(invalid="ignore"):  # NaN and numbers above 255, which the comparison finds
        pixels = values.astype(np.uint8, copy=False)
    if not np.array_equal(pixels, values):
        raise _invalid("wrong_data", tensor, PIXELS_ONLY)
    return pixels.reshape(shape)


def _elements(tensor: InputTensor, shape: tuple[int, ...]) -> list[Any]:
    """Return the elements of the data of *tensor*, a list that is flat or nested like *shape*."""
    data = tensor.data
    elements = [tensor.data]
    is_flat = isinstance(data, list) and len(data) > 0 and not isinstance(data[0], list)
    # The lengths of the lists at each level, from the outermost one.
    lengths = (prod(shape),) if is_flat else shape

    for length in lengths:
        if set(map(type, elements)) != {list} or set(map(len, elements)) != {length}:
            message = f"shape {list(shape)} needs {prod(shape)} elements in `data`, flat or nested like the shape"
            raise _invalid("wrong_data", tensor, message)
        elements = list(chain.from_iterable(elements))

    return elements


def _split_elements(tensor: InputTensor, raw: memoryview, count: int) -> list[bytes]:
    """Split a BYTES tensor: each of *count* elements is its length, 4 bytes little-endian, and its bytes."""
    elements = []
    position = 0
    for number in range(count):
        begin = position + LENGTH_BYTES
        end = begin + int.from_bytes(raw[position:begin], "little")

        if end > len(raw):
            message = f"element {number} does not fit into {len(raw)} bytes"
            raise _invalid("wrong_binary_size", tensor, message)

        elements.append(bytes(raw[begin:end]))
        position = end

    if position != len(raw):
        message = f"{len(raw) - position} bytes remain after element {count - 1}"
        raise _invalid("wrong_binary_size", tensor, message)
    return elements
