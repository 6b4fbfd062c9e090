"""Lists of numbers, taken out of a JSON text before it is parsed, and read piece by piece.

A list of numbers as Python objects is many times its text, and the parser holds the interpreter until it is
done: 16 MB of nested lists stop every other request for seconds. Their shape can be seen from the brackets
alone, and then the numbers are one flat list that can be read in pieces, with a breath for the event loop
after each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from secrets import token_hex
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sopdeploy_service.api.v2.metadata import DTYPES, Tensor
from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.http.strict_json import bad_request, parts

PIECE_BYTES = 65_536  # under a millisecond each
WHITESPACE = b" \t\r\n"
LIST_FOLLOWS = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
BLANKS_FOR_BRACKETS = bytes.maketrans(b"[]", b"  ")
WHOLE = b"0123456789-"
BROKEN = WHOLE + b"+.eE"


@dataclass(frozen=True, slots=True)
class NumberText:
    """The text of a list, with all its brackets; what is in it is not known yet."""

    text: bytes

    def read(self, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the numbers, flat or nested in the text, as an array of *shape*.

        Raises `RefusedError` for another shape and for what *tensor* cannot hold.
        """
        dtype = DTYPES[tensor.datatype]
        digits = WHOLE if dtype.kind in "iu" else BROKEN
        zeros = bytes.maketrans(digits, b"0" * len(digits))
        check_shape(translated(self.text, zeros, WHITESPACE), tensor, shape)
        pieces = [numbers(piece.translate(BLANKS_FOR_BRACKETS), tensor, dtype) for piece in cut(self.text)]
        return np.concatenate(pieces).reshape(shape)


def lift(raw: bytes) -> tuple[bytes, dict[str, NumberText]]:
    """Return the document *raw* with a token for each list without strings under `data`, and those lists."""
    lifted: dict[str, NumberText] = {}
    secret = token_hex(8)  # no client can write such a token
    kept: list[bytes] = []
    place = done = 0
    before = b""
    for number, part in enumerate(parts(raw)):
        span = whole_list(part) if number % 2 == 0 and before == b"data" else None
        if span is not None:
            token = f"{secret}:{number}"
            kept += [raw[done : place + span[0]], b'"%s"' % token.encode()]
            done = place + span[1]
            lifted[token] = NumberText(raw[place + span[0] : done])
        place += len(part) + 1
        before = part
    return b"".join([*kept, raw[done:]]), lifted


def whole_list(part: bytes) -> tuple[int, int] | None:
    """Return where a list begins and ends in *part*, the text after a key; None where it is not all there."""
    colon = LIST_FOLLOWS.match(part)
    if colon is None:
        return None
    stop = part.find(b"}")
    end = part.rfind(b"]", 0, stop if stop >= 0 else len(part)) + 1
    after = part[end:].lstrip()[:1]
    if end == 0 or not (after == b"}" or part[end:].strip() in {b"", b","}):
        return None
    return (colon.end(), end) if balanced(part[colon.end() : end]) else None


def balanced(text: bytes) -> bool:
    """Return whether as many brackets close in *text* as open, with a breath between pieces."""
    pieces = ((begin, begin + PIECE_BYTES) for begin in range(0, len(text), PIECE_BYTES))
    return sum(text.count(b"[", *piece) - text.count(b"]", *piece) for piece in pieces) == 0


def put_back(value: Any, lifted: dict[str, NumberText]) -> None:
    """Put the lists into the inputs of the request *value* that they were taken from."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    for item in inputs if isinstance(inputs, list) else ():
        if isinstance(item, dict) and isinstance(item.get("data"), str):
            item["data"] = lifted.get(item["data"], item["data"])


def check_shape(outline: bytes, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `RefusedError` unless *outline*, a text with 0 for each character of a number, has *shape*.

    The brackets and commas say the shape; a number behind a bracket that closes, or before one that opens,
    stands outside of its list.
    """
    brackets = translated(outline, None, b"0")
    if brackets.translate(None, b"[],"):
        kind = "finite numbers" if DTYPES[tensor.datatype].kind == "f" else "whole numbers"
        raise bad_request("wrong_data", f"input {tensor.name!r}: {tensor.datatype} data must be {kind}")
    nested = b""
    for size in reversed(shape):
        nested = b"[" + b",".join([nested] * size) + b"]"
    flat = b"[" + b"," * (prod(shape) - 1) + b"]"
    if brackets not in {nested, flat} or within(b"]0", outline) or within(b"0[", outline):
        raise ragged(tensor, shape)


def translated(text: bytes, table: bytes | None, delete: bytes) -> bytes:
    """Return what `text.translate` returns, with a breath between pieces."""
    begins = range(0, len(text), PIECE_BYTES)
    return b"".join(text[begin : begin + PIECE_BYTES].translate(table, delete) for begin in begins)


def within(pair: bytes, text: bytes) -> bool:
    """Return whether the two bytes *pair* stand in *text* side by side, with a breath between pieces."""
    begins = range(0, len(text), PIECE_BYTES)
    return any(pair in text[begin : begin + PIECE_BYTES + 1] for begin in begins)


def ragged(tensor: Tensor, shape: tuple[int, ...]) -> RejectedError:
    """Return the error of data that has not the *shape* it says."""
    return bad_request(
        "wrong_data",
        f"input {tensor.name!r}: shape {list(shape)} needs {prod(shape)} elements in `data`, "
        "flat or nested like the shape",
    )


def cut(text: bytes) -> Iterator[bytes]:
    """Yield *text*, cut at commas into pieces of about `PIECE_BYTES`."""
    begin = 0
    while begin <= len(text):
        comma = text.find(b",", begin + PIECE_BYTES)
        end = comma if comma >= 0 else len(text)
        yield text[begin:end]
        begin = end + 1


def numbers(piece: bytes, tensor: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the numbers in *piece*, with commas between them."""
    try:
        values = orjson.loads(b"[" + piece + b"]")
    except orjson.JSONDecodeError as problem:
        raise bad_request("wrong_data", f"input {tensor.name!r}: data cannot be read: {problem}") from problem
    if not values:
        raise bad_request("wrong_data", f"input {tensor.name!r}: data cannot be read: a number is missing")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if min(values) < limits.min or max(values) > limits.max:
            raise bad_request(
                "wrong_data", f"input {tensor.name!r}: must lie between {limits.min} and {limits.max}"
            )
        return np.array(values, dtype)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and that is refused
        return finite(np.array(values, np.float64).astype(dtype), tensor)


def finite(values: NDArray[Any], tensor: Tensor) -> NDArray[Any]:
    """Return *values*; raises `RefusedError` where one is NaN, infinite or too large for its type."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise bad_request(
            "wrong_data", f"input {tensor.name!r}: every number must be a finite {tensor.datatype}"
        )
    return values
