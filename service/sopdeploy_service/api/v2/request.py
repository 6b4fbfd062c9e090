"""Parse the body of an inference request: JSON, or JSON followed by binary tensors.

Binary tensors follow in the order of the inputs; the header `Inference-Header-Content-Length` is the length
of the JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from struct import unpack_from
from typing import Any, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import NonNegativeInt

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import decode_text, parse_json
from sopdeploy_service.inference.results import RejectedError

MICROSECONDS = 1e6
MAX_DIGITS = 20  # of the header; `int` rejects thousands of digits
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # of the input and of the outputs of every bundle
FLOAT_PIXELS = "FP32"  # what clients that compute in floating point send instead of UINT8
PIXELS_ONLY = (
    "values must be whole numbers from 0 to 255: send pixels before any scaling and normalization, "
    "which are part of the network, and round the result of a resize"
)
LENGTH_BYTES = 4  # before every element of a binary BYTES tensor


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a model; the first dimension of *shape* is the batch, -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def expected_shape(self) -> str:
        """The shape for error messages: `[n, 224, 224, 3]`."""
        return "[" + ", ".join(["n", *map(str, self.shape[1:])]) + "]"


IMAGE = Tensor("IMAGE", "BYTES", (-1, 1))


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors of a model, and the largest number of images in a request.

    A request gives one of two inputs: *tensor* or `IMAGE`.
    """

    tensor: Tensor
    outputs: tuple[Tensor, ...]
    max_images: int


def signature_of(bundle: Bundle, max_images: int) -> Signature:
    """Create the signature of *bundle* for requests of at most *max_images*."""
    manifest = bundle.manifest
    tensor, *outputs = (
        Tensor(record.name, DATATYPES[record.dtype], tuple(-1 if n is None else n for n in record.shape))
        for record in (manifest.inputs[0], *manifest.outputs)
    )
    return Signature(tensor, tuple(outputs), max_images)


class Body(pydantic.BaseModel):
    """A JSON object whose unknown keys are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


class InputParameters(Body):
    """Parameters of an input."""

    binary_data_size: NonNegativeInt | None = None


class InputTensor(Body):
    """One input: `data` in JSON, or `binary_data_size` bytes after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: InputParameters = InputParameters()
    data: Any = None  # row by row, flat or nested; BYTES as base64


class OutputParameters(Body):
    """Parameters of an output."""

    binary_data: bool | None = None
    classification: NonNegativeInt = 0  # an extension of Triton, which `/v1/classify` replaces


class OutputTensor(Body):
    """One requested output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Body):
    """Parameters of a request; `timeout` is in microseconds."""

    binary_data_output: bool | None = None
    timeout: NonNegativeInt | None = None


class InferBody(Body):
    """The JSON of an inference request."""

    id: str | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: list[InputTensor]
    outputs: list[OutputTensor] = []


class RequestedOutput(NamedTuple):
    """An output to return, in *binary* or in JSON."""

    tensor: Tensor
    binary: bool


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A valid request: *images* are encoded files or uint8 (n, H, W, 3)."""

    id: str | None
    images: list[bytes] | NDArray[np.uint8]
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
    request = parse_json(InferBody, text, max_json)
    return InferRequest(
        id=request.id,
        images=_read_images(request.inputs, binary, signature),
        outputs=_requested_outputs(request, signature),
        timeout_seconds=(request.parameters.timeout or 0) / MICROSECONDS or None,
    )


def _requested_outputs(request: InferBody, signature: Signature) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs, or all except the embedding if none is requested."""
    tensors = {tensor.name: tensor for tensor in signature.outputs}
    by_default = bool(request.parameters.binary_data_output)  # outputs that choose no format
    requested: dict[str, RequestedOutput] = {}
    for output in request.outputs:
        if output.name not in tensors:
            message = f"no output {output.name[:100]!r}; available: {', '.join(tensors)}"
            raise bad_request("unknown_output", message)
        if output.name in requested:
            raise bad_request("duplicate_output", f"output {output.name!r} occurs twice")
        if output.parameters.classification:
            message = "outputs are numbers; omit class_count (`classification`), or use /v1/classify"
            raise bad_request("no_classification", message)
        chosen = output.parameters.binary_data
        binary = by_default if chosen is None else chosen
        requested[output.name] = RequestedOutput(tensors[output.name], binary)
    if requested:
        return tuple(requested.values())
    return tuple(
        RequestedOutput(tensor, by_default) for tensor in signature.outputs if tensor.name != EMBEDDING
    )


def _read_images(
    inputs: Sequence[InputTensor], binary: memoryview, signature: Signature
) -> list[bytes] | NDArray[np.uint8]:
    """Return the images of the only input, from its JSON or from *binary*."""
    tensors = {tensor.name: tensor for tensor in (signature.tensor, IMAGE)}
    if len(inputs) != 1 or inputs[0].name not in tensors:
        raise bad_request(
            "wrong_inputs",
            f"give one of the inputs {signature.tensor.name!r} "
            f"({signature.tensor.datatype} {signature.tensor.expected_shape}) and 'IMAGE' "
            "(BYTES [n], encoded images)",
        )
    item, tensor = inputs[0], tensors[inputs[0].name]
    allowed = (tensor.datatype,) if tensor is IMAGE else (tensor.datatype, FLOAT_PIXELS)
    if item.datatype not in allowed:
        message = f"the datatype must be {' or '.join(allowed)}, not {item.datatype[:20]!r}"
        raise _invalid("wrong_datatype", tensor, message)
    shape = _check_shape(item.shape, tensor, signature.max_images)
    size = item.parameters.binary_data_size
    if (size is None) == (item.data is None):
        raise _invalid("wrong_data", tensor, "must have either `data` or the parameter `binary_data_size`")
    if len(binary) != (size or 0):
        raise bad_request(
            "wrong_binary_size",
            f"{len(binary)} bytes follow the JSON, but its inputs declare {size or 0}; with binary data the "
            "header Inference-Header-Content-Length must be the length of the JSON",
        )
    if tensor is IMAGE:
        return _split_elements(binary, shape[0]) if size is not None else _decode_texts(item.data, shape)
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


def _check_shape(shape: list[int], tensor: Tensor, max_images: int) -> tuple[int, ...]:
    """Return *shape* if *tensor* may have it; `IMAGE` may be [n] or [n, 1]."""
    rule = f"the shape must be {tensor.expected_shape} with n from 1 to {max_images}"
    allowed = {tensor.shape[1:], ()} if tensor is IMAGE else {tensor.shape[1:]}
    if not shape or shape[0] < 1 or tuple(shape[1:]) not in allowed:
        raise _invalid("wrong_shape", tensor, f"{rule}, not {str(shape)[:100]}")
    if shape[0] > max_images:
        raise _invalid("too_many_images", tensor, f"{rule}, the limit of this server")
    return tuple(shape)


def _pixels_from_json(item: InputTensor, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Convert the data of *item*, numbers in a list that is flat or nested like *shape*, to that shape."""
    try:
        values = np.array(item.data).reshape(shape)
    except ValueError as problem:  # another number of elements, or rows that differ in length
        raise _invalid("wrong_data", tensor, _wrong_count(shape)) from problem
    if values.dtype.kind not in "iuf":
        raise _invalid("wrong_data", tensor, PIXELS_ONLY)
    return _as_pixels(values, tensor)


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
