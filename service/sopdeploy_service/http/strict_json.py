"""Strict parsing of untrusted JSON and base64.

orjson rejects deep nesting, NaN, Infinity and numbers beyond float64. It keeps the last of several equal
keys; two parsers that keep different ones see different requests, so duplicate keys are rejected here. orjson
holds the GIL, also in a thread: limits on the number of strings and on the bytes between them keep that
short.
"""

import binascii
from typing import Any

import orjson

from sopdeploy_service.http.problems import bad_request
from sopdeploy_service.inference.results import RejectedError, Rejection

MAX_QUOTES = 10_000
MAX_STRUCTURE = 100_000  # bytes outside of strings
URL_SAFE = bytes.maketrans(b"-_", b"+/")
WHITESPACE = b" \t\r\n\f\v"

TOO_COMPLEX = Rejection(  # more strings, numbers or brackets than any valid request
    "json_too_complex", 400, "the JSON has too many values; only lists under `data` may contain many numbers"
)


def parse(raw: bytes, limit: int) -> Any:
    """Parse the JSON document *raw* of at most *limit* bytes; call it in a thread.

    Raises `RejectedError` if it is too large, too complex, malformed or has duplicate keys.
    """
    check_length(raw, limit)
    outside = parts(raw)[0::2]
    if sum(map(len, outside)) > MAX_STRUCTURE:
        raise RejectedError(TOO_COMPLEX)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as problem:
        raise bad_request("malformed_json", f"malformed JSON: {problem}") from problem
    keys = sum(part.lstrip().startswith(b":") for part in outside[1:])  # strings followed by a colon
    if keys != count_keys(value):
        raise bad_request("duplicate_key", "an object in the JSON has the same key twice")
    return value


def count_keys(value: Any) -> int:
    """Count the keys of all objects in *value*."""
    keys, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            keys += len(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return keys


def check_length(raw: bytes, limit: int) -> None:
    """Raise `RejectedError` (413) if the document *raw* has more than *limit* bytes."""
    if len(raw) > limit:
        message = (
            f"the JSON is larger than {limit} bytes, the limit of this server; send binary images or tensors"
        )
        raise RejectedError(Rejection("json_too_large", 413, message))


def parts(raw: bytes) -> list[bytes]:
    """Split the document *raw* at quotation marks: text outside and inside of strings alternates.

    Escape sequences are masked, all lengths are kept. Raises `RejectedError` for too many strings.
    """
    if raw.count(b'"') > MAX_QUOTES:
        raise RejectedError(TOO_COMPLEX)
    masked = raw.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in raw else raw
    return masked.split(b'"')


def decode_text(text: object, where: str) -> bytes:
    """Decode base64, also URL-safe, unpadded, with whitespace, or in a data URI.

    Raises `RejectedError`, which names the place *where*, for other types, characters and lengths.
    """
    if not isinstance(text, str):
        raise bad_request("malformed_request", f"{where}: must be a base64 string")
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            raise bad_request("bad_base64", f"{where}: not base64: a data URI must contain `;base64,`")
    if not text.isascii():
        raise bad_request("bad_base64", f"{where}: not base64: characters outside of the alphabet")
    plain = text.encode("ascii").translate(URL_SAFE, WHITESPACE)
    plain += b"=" * (-len(plain) % 4 if not plain.endswith(b"=") else 0)
    try:
        return binascii.a2b_base64(plain, strict_mode=True)
    except binascii.Error as problem:
        raise bad_request("bad_base64", f"{where}: not base64: {problem}") from problem
