"""Read lists of numbers from JSON text under the limits of their tensor.

A JSON parser creates an object for every list, so 16 MB of `[],[],...` would need many times their size and
hold the interpreter lock for seconds. Here the lists under `data` are cut out before the document is parsed.
Their brackets and commas alone show their shape, so the numbers are parsed as one flat list.
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

LIST_FOLLOWS = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
WHITESPACE = b" \t\r\n"
INTEGER_TO_ZEROS = bytes.maketrans(b"0123456789-", b"0" * 11)
FLOAT_TO_ZEROS = bytes.maketrans(b"0123456789-+.eE", b"0" * 15)
BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")


@dataclass(frozen=True, slots=True)
class NumberList:
    """The JSON text of a list, with all its brackets; its contents are not checked yet."""

    text: bytes

    def read(self, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
        """Convert the text, a flat or nested list, to an array of *shape*.

        Raises `RejectedError` for another shape and for values that *tensor* cannot hold.
        """
        dtype = DTYPES[tensor.datatype]
        is_integer = dtype.kind in "iu"
        where = f"input {tensor.name!r}"
        zeros = INTEGER_TO_ZEROS if is_integer else FLOAT_TO_ZEROS
        outline = self.text.translate(zeros, WHITESPACE)
        brackets = outline.translate(None, b"0")
        if brackets.translate(None, b"[],"):
            kind = "whole numbers" if is_integer else "finite numbers"
            raise bad_request("wrong_data", f"{where}: {tensor.datatype} data must be {kind}")
        nested = b""
        for size in reversed(shape):
            nested = b"[" + b",".join([nested] * size) + b"]"
        flat = b"[" + b"," * (prod(shape) - 1) + b"]"
        if brackets not in {nested, flat} or b"]0" in outline or b"0[" in outline:
            raise wrong_count_error(tensor, shape)
        try:
            numbers = orjson.loads(b"[" + self.text.translate(BRACKETS_TO_SPACES) + b"]")
        except orjson.JSONDecodeError as error:
            raise bad_request("wrong_data", f"{where}: invalid data: {error}") from error
        if len(numbers) != prod(shape):
            raise wrong_count_error(tensor, shape)
        values = np.array(numbers, None if is_integer else np.float64)
        if is_integer:
            limits = np.iinfo(dtype)
            if values.dtype.kind == "f" or values.min() < limits.min or values.max() > limits.max:
                message = f"{where}: values must be between {limits.min} and {limits.max}"
                raise bad_request("wrong_data", message)
        with np.errstate(over="ignore"):  # values beyond the range become infinite and are rejected
            return check_finite(values.astype(dtype).reshape(shape), tensor)


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
    begin = colon.end()
    is_complete = part.count(b"[", begin, end) == part.count(b"]", begin, end)
    return (begin, end) if is_complete else None
