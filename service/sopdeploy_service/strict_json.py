"""JSON from strangers: no key twice, no endless nesting, no number that is not finite.

orjson refuses what is too deep, NaN, Infinity and numbers above a float64 by itself. Of a key that stands
twice it keeps the last; two readers that keep different ones see different requests, so that is refused here.
"""

import re
from typing import Any

import orjson

from sopdeploy_service.outcome import Refusal
from sopdeploy_service.problems import RefusedError

ESCAPE = re.compile(rb"\\.")


def bad_request(code: str, message: str) -> RefusedError:
    """Return the error, status 400, of a request that the client has to write another way."""
    return RefusedError(Refusal(code, 400, message))


def parse(raw: bytes, limit: int) -> Any:
    """Return the value of the JSON document *raw*, of at most *limit* bytes; for a thread, not the loop.

    Raises `RefusedError` where it is too long, damaged or ambiguous.
    """
    if len(raw) > limit:
        raise RefusedError(too_large_json(limit))
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as problem:
        raise bad_request("malformed_json", f"the JSON cannot be read: {problem}") from problem
    if keys_written(raw) != keys_kept(value):
        raise bad_request("duplicate_key", "the JSON has an object with the same key twice")
    return value


def keys_written(raw: bytes) -> int:
    """Return how many keys stand in *raw*, a valid JSON document.

    Without its escapes, every quotation mark begins or ends a string; a string before a colon is a key.
    """
    around = ESCAPE.sub(b"", raw).split(b'"')
    return sum(part.lstrip().startswith(b":") for part in around[2::2])


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
            waiting.extend(inner for inner in here if type(inner) is dict or type(inner) is list)
    return keys


def too_large_json(limit: int) -> Refusal:
    """Return the refusal of a JSON document of more than *limit* bytes."""
    return Refusal(
        "json_too_large",
        413,
        f"the JSON is larger than {limit} bytes, the limit of this server; send images or tensors as binary",
    )
