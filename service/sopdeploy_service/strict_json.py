"""JSON from strangers: no key twice, no endless nesting, no infinite number, no mountain of objects.

orjson refuses what is too deep, NaN, Infinity and numbers above a float64 by itself. Of a key that stands
twice it keeps the last; two readers that keep different ones see different requests, so that is refused here.
It holds the interpreter while it works, in a thread too; with few strings and little between them that is
short.
"""

from typing import Any

import orjson

from sopdeploy_service.outcome import Refusal
from sopdeploy_service.problems import RefusedError

MOST_QUOTES = 10_000
MOST_STRUCTURE = 100_000  # bytes outside of strings


def bad_request(code: str, message: str) -> RefusedError:
    """Return the error, status 400, of a request that the client has to write another way."""
    return RefusedError(Refusal(code, 400, message))


def parse(raw: bytes, limit: int) -> Any:
    """Return the value of the JSON document *raw*, of at most *limit* bytes; for a thread, not the loop.

    Raises `RefusedError` where it is too long, too complex, damaged or ambiguous.
    """
    check_length(raw, limit)
    outside = parts(raw)[0::2]
    if sum(map(len, outside)) > MOST_STRUCTURE:
        raise too_complex()
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as problem:
        raise bad_request("malformed_json", f"the JSON cannot be read: {problem}") from problem
    keys_written = sum(part.lstrip().startswith(b":") for part in outside[1:])  # a string before a colon
    if keys_written != keys_kept(value):
        raise bad_request("duplicate_key", "the JSON has an object with the same key twice")
    return value


def check_length(raw: bytes, limit: int) -> None:
    """Raise `RefusedError` where the document *raw* has more than *limit* bytes."""
    if len(raw) > limit:
        raise RefusedError(too_large_json(limit))


def parts(raw: bytes) -> list[bytes]:
    """Return what stands outside and inside of the strings of the document *raw*, in turn.

    With a quotation mark between each two, the parts have the lengths of the text they stand for; escapes
    are blotted out. Raises `RefusedError` where there are too many.
    """
    if raw.count(b'"') > MOST_QUOTES:
        raise too_complex()
    plain = raw.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in raw else raw
    found = []
    begin = 0
    while (end := plain.find(b'"', begin)) >= 0:  # `split` takes longer, in one breath
        found.append(plain[begin:end])
        begin = end + 1
    return [*found, plain[begin:]]


def keys_kept(value: Any) -> int:
    """Return how many keys the objects in *value* have, all together."""
    keys = 0
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if type(here) is dict:
            keys += len(here)
            waiting.extend(here.values())
        elif type(here) is list:
            waiting.extend(here)
    return keys


def too_complex() -> RefusedError:
    """Return the error of a document with more strings, numbers or brackets than any request needs."""
    return bad_request("json_too_complex", "the JSON has too many parts; only `data` may hold many numbers")


def too_large_json(limit: int) -> Refusal:
    """Return the refusal of a JSON document of more than *limit* bytes."""
    return Refusal(
        "json_too_large",
        413,
        f"the JSON is larger than {limit} bytes, the limit of this server; send images or tensors as binary",
    )
