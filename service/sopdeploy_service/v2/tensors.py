"""The data of one input to an array, or to the bytes of images; nothing is believed before it was checked.

Sizes are computed with Python's integers, which do not overflow.
"""

from math import prod
from struct import unpack_from
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.base64_text import decode_text
from sopdeploy_service.problems import RefusedError
from sopdeploy_service.strict_json import bad_request
from sopdeploy_service.v2.number_text import NumberText, finite, ragged
from sopdeploy_service.v2.signature import DTYPES, IMAGE, Tensor

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


def wrong_length(what: str) -> RefusedError:
    """Return the error of BYTES whose lengths do not add up."""
    return bad_request("wrong_binary_size", f"input 'IMAGE': {what}")
