"""Strict parsing of untrusted JSON and base64.

orjson rejects NaN, Infinity and numbers beyond float64, and keeps the last of several equal keys.
It holds the GIL, also in a thread: limits on the size and on the number of values, which are
counted first, keep that short.
"""

import binascii
import re
from typing import TypeVar

import orjson
import pydantic

from sopdeploy.base.config import first_problem
from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.inference.results import HttpError, RejectedError

MAX_QUOTES = 10_000  # two of each string, and escaped ones
MAX_COMMAS = 1_000_000  # beside those of a tensor
MAX_ESCAPES = 1_000_000  # some clients escape two characters of the alphabet of base64
MAX_LISTS = 100_000  # and objects, beside those of a tensor
MAX_BRACKETS = 1_000_000  # opening ones; 20 nested images of 224 x 224 pixels have as many
ParsedBody = TypeVar("ParsedBody", bound=pydantic.BaseModel)
URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
URL_SAFE = bytes.maketrans(b"-_", b"+/")
WHITESPACE = b" \t\r\n\f\v"

# More than any valid request has
TOO_COMPLEX = HttpError(
    "json_too_complex", 400, "the JSON has too many strings, numbers, lists or objects"
)
TOO_DEEP = HttpError(
    "malformed_json", 400, "malformed JSON: lists and objects are nested too deeply"
)


def parse_json(
    body_type: type[ParsedBody], raw: bytes, limit: int, max_elements: int = 0
) -> ParsedBody:
    """Parse the JSON document *raw* of at most *limit* bytes as *body_type*; call it in a thread.

    *max_elements* is the number of elements of its largest tensor. Every other list of
    *body_type* has a maximum length, so that a long list is one error, not one per element.
    Raises `RejectedError` if the document is too large, malformed or invalid, has too many
    values, or more levels than can be written back.
    """
    # Refuse by its size and its punctuation what would take long to parse, or much memory.
    if len(raw) > limit:
        message = (
            f"the JSON is larger than the limit, {limit} bytes; send binary images or tensors"
        )
        raise RejectedError(HttpError("json_too_large", 413, message))

    # The nested lists of a tensor are fewer than twice its elements, even if each pixel is a list
    # of one element.
    max_brackets = min(MAX_BRACKETS, MAX_LISTS + 2 * max_elements)
    if (
        raw.count(b'"') > MAX_QUOTES
        or raw.count(b",") > MAX_COMMAS + max_elements
        or raw.count(b"[") + raw.count(b"{") > max_brackets
        or raw.count(b"\\") > MAX_ESCAPES
    ):
        raise RejectedError(TOO_COMPLEX)

    # Parse it, and write it again: only the depth cannot be written.
    try:
        value = orjson.loads(raw)
        orjson.dumps(value)
    except orjson.JSONDecodeError as problem:
        raise bad_request("malformed_json", f"malformed JSON: {problem}") from problem
    except orjson.JSONEncodeError as problem:
        raise RejectedError(TOO_DEEP) from problem

    # Check the types.
    try:
        return body_type.model_validate(value)
    except pydantic.ValidationError as problem:
        raise bad_request("malformed_request", first_problem(problem, value)) from problem


def decode_text(text: object, where: str) -> bytes:
    """Decode base64, also URL-safe, unpadded or in a data URI; raises `RejectedError` that names *where*."""
    # Take the base64 out of a data URI.
    if not isinstance(text, str):
        raise bad_request("malformed_request", f"{where}: must be a base64 string")
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise bad_request(
                "bad_base64", f"{where}: not base64: a data URI must contain `;base64,`"
            )

    if URL.match(text):
        message = (
            f"{where}: is a URL, and URLs are not fetched; send the image itself, as base64"
        )
        raise bad_request("bad_base64", message)

    if not text.isascii():
        raise bad_request(
            "bad_base64", f"{where}: not base64: characters outside of the alphabet"
        )

    # Decode, with the padding that a client may omit.
    plain = text.encode("ascii").translate(URL_SAFE, WHITESPACE)
    if not plain.endswith(b"="):
        plain += b"=" * (-len(plain) % 4)  # to a multiple of 4

    try:
        return binascii.a2b_base64(plain, strict_mode=True)
    except binascii.Error as problem:
        raise bad_request("bad_base64", f"{where}: not base64: {problem}") from problem
