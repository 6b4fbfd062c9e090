"""Read lists of numbers from JSON text without creating a Python object per number.

As Python objects, 16 MB of nested lists take many times their size, and a JSON parser holds the interpreter
lock for seconds. Here the lists under `data` are cut out before the document is parsed. Their brackets alone
show their shape, so the numbers are read as one flat list, piece by piece, and other threads run in between.
"""

import re
from dataclasses import dataclass
from math import prod
from secrets import token_hex
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sopdeploy_service.api.v2.metadata import DTYPES, Tensor
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.http.strict_json import parts
from sopdeploy_service.inference.results import RejectedError

PIECE_BYTES = 65_536  # under a millisecond each
WHITESPACE = b" \t\r\n"
LIST_FOLLOWS = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")
INTEGER_CHARACTERS = b"0123456789-"
FLOAT_CHARACTERS = INTEGER_CHARACTERS + b"+.eE"


@dataclass(frozen=True, slots=True)
class NumberList:
    """The JSON text of a list, with all its brackets; its contents are not checked yet."""

    text: bytes

    def read(self, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
        """Convert the text, a flat or nested list, to an array of *shape*.

        Raises `RejectedError` for another shape and for values that *tensor* cannot hold.
        """
        dtype = DTYPES[tensor.datatype]
        characters = INTEGER_CHARACTERS if dtype.kind in "iu" else FLOAT_CHARACTERS
        zeros = bytes.maketrans(characters, b"0" * len(characters))
        self._check_shape(_translate(self.text, zeros, WHITESPACE), tensor, shape)
        pieces = []
        begin = 0
        while begin <= len(self.text):
            comma = self.text.find(b",", begin + PIECE_BYTES)
            end = comma if comma >= 0 else len(self.text)
            pieces.append(_read_numbers(self.text[begin:end].translate(BRACKETS_TO_SPACES), tensor))
            begin = end + 1
        return np.concatenate(pieces).reshape(shape)

    def _check_shape(self, outline: bytes, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Check *outline*, the text with 0 for every character of a number, against *shape*.

        Brackets and commas define the shape. A number directly after `]` or before `[` is outside of its
        list.
        """
        brackets = _translate(outline, None, b"0")
        if brackets.translate(None, b"[],"):
            kind = "finite numbers" if DTYPES[tensor.datatype].kind == "f" else "whole numbers"
            raise bad_request("wrong_data", f"input {tensor.name!r}: {tensor.datatype} data must be {kind}")
        nested = b""
        for size in reversed(shape):
            nested = b"[" + b",".join([nested] * size) + b"]"
        flat = b"[" + b"," * (prod(shape) - 1) + b"]"
        begins = range(0, len(outline), PIECE_BYTES)
        pieces = (outline[begin : begin + PIECE_BYTES + 1] for begin in begins)  # they overlap by one byte
        if brackets not in {nested, flat} or any(b"]0" in piece or b"0[" in piece for piece in pieces):
            raise wrong_count_error(tensor, shape)


def wrong_count_error(tensor: Tensor, shape: tuple[int, ...]) -> RejectedError:
    """Create the error of `data` that does not have the given *shape*."""
    return bad_request(
        "wrong_data",
        f"input {tensor.name!r}: shape {list(shape)} needs {prod(shape)} elements in `data`, "
        "flat or nested like the shape",
    )


def check_finite(values: NDArray[Any], tensor: Tensor) -> NDArray[Any]:
    """Return *values*; raise `RejectedError` if one is NaN or infinite."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        message = f"input {tensor.name!r}: every number must be a finite {tensor.datatype}"
        raise bad_request("wrong_data", message)
    return values


def extract_lists(raw: bytes) -> tuple[bytes, dict[str, NumberList]]:
    """Replace each list of numbers under a key `data` by a token; return the lists by token."""
    lists: dict[str, NumberList] = {}
    secret = token_hex(8)  # clients cannot forge a token
    kept: list[bytes] = []
    position = done = 0
    before = b""
    for number, part in enumerate(parts(raw)):
        span = _list_span(part) if number % 2 == 0 and before == b"data" else None
        if span is not None:
            token = f"{secret}:{number}"
            kept += [raw[done : position + span[0]], b'"%s"' % token.encode()]
            done = position + span[1]
            lists[token] = NumberList(raw[position + span[0] : done])
        position += len(part) + 1
        before = part
    return b"".join([*kept, raw[done:]]), lists


def _list_span(part: bytes) -> tuple[int, int] | None:
    """Find the list in *part*, the text after a key; None if it is not a complete list."""
    colon = LIST_FOLLOWS.match(part)
    if colon is None:
        return None
    brace = part.find(b"}")
    end = part.rfind(b"]", 0, brace if brace >= 0 else len(part)) + 1
    after = part[end:].lstrip()[:1]
    if end == 0 or not (after == b"}" or part[end:].strip() in {b"", b","}):
        return None
    begins = range(colon.end(), end, PIECE_BYTES)
    pieces = (part[begin : min(begin + PIECE_BYTES, end)] for begin in begins)
    depth = sum(piece.count(b"[") - piece.count(b"]") for piece in pieces)
    return None if depth else (colon.end(), end)


def _translate(text: bytes, table: bytes | None, delete: bytes) -> bytes:
    """Call `text.translate` piece by piece, so that other threads run in between."""
    begins = range(0, len(text), PIECE_BYTES)
    return b"".join(text[begin : begin + PIECE_BYTES].translate(table, delete) for begin in begins)


def _read_numbers(piece: bytes, tensor: Tensor) -> NDArray[Any]:
    """Read comma-separated numbers; reject values that *tensor* cannot hold."""
    try:
        values = orjson.loads(b"[" + piece + b"]")
    except orjson.JSONDecodeError as error:
        raise bad_request("wrong_data", f"input {tensor.name!r}: invalid data: {error}") from error
    if not values:
        raise bad_request("wrong_data", f"input {tensor.name!r}: invalid data: a number is missing")
    dtype = DTYPES[tensor.datatype]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if min(values) < limits.min or max(values) > limits.max:
            message = f"input {tensor.name!r}: values must be between {limits.min} and {limits.max}"
            raise bad_request("wrong_data", message)
        return np.array(values, dtype)
    with np.errstate(over="ignore"):  # values beyond the range become infinite and are rejected
        return check_finite(np.array(values, np.float64).astype(dtype), tensor)
