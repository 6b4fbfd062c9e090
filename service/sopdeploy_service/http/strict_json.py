"""JSON from strangers: no key twice, no endless nesting, no infinite number, no mountain of objects.

orjson refuses what is too deep, NaN, Infinity and numbers above a float64 by itself. Of a key that stands
twice it keeps the last; two readers that keep different ones see different requests, so that is refused here.
It holds the interpreter while it works, in a thread too; with few strings and little between them that is
short.
"""

import binascii
from typing import Any

import orjson

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.results import Rejection

MOST_QUOTES = 10_000
MOST_STRUCTURE = 100_000  # bytes outside of strings


def bad_request(code: str, message: str) -> RejectedError:
    """Return the error, status 400, of a request that the client has to write another way."""
    return RejectedError(Rejection(code, 400, message))


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
        raise RejectedError(too_large_json(limit))


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


def too_complex() -> RejectedError:
    """Return the error of a document with more strings, numbers or brackets than any request needs."""
    return bad_request("json_too_complex", "the JSON has too many parts; only `data` may hold many numbers")


def too_large_json(limit: int) -> Rejection:
    """Return the refusal of a JSON document of more than *limit* bytes."""
    return Rejection(
        "json_too_large",
        413,
        f"the JSON is larger than {limit} bytes, the limit of this server; send images or tensors as binary",
    )


URL_SAFE = bytes.maketrans(b"-_", b"+/")
WHITESPACE = b" \t\r\n\f\v"


def decode_text(text: object, where: str) -> bytes:
    """Return the bytes that *text* stands for; *where* names its place in the request.

    Raises `RefusedError` where it is no string, or has a character or a length that base64 has not.
    """
    if not isinstance(text, str):
        raise bad_request("malformed_request", f"{where}: must be a string of base64")
    payload = without_uri(text, where)
    if not payload.isascii():
        raise wrong(where, "it has characters outside the alphabet")
    plain = payload.encode("ascii").translate(URL_SAFE, WHITESPACE)
    plain += b"=" * (-len(plain) % 4 if not plain.endswith(b"=") else 0)
    try:
        return binascii.a2b_base64(plain, strict_mode=True)
    except binascii.Error as problem:
        raise wrong(where, str(problem)) from problem


def without_uri(text: str, where: str) -> str:
    """Return what follows `data:...;base64,`, or *text* as it is where it is no data URI."""
    if text[:5].lower() != "data:":
        return text
    kind, comma, payload = text.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise wrong(where, "a data URI must say `;base64,`")
    return payload


def wrong(where: str, reason: str) -> RejectedError:
    """Return the error of a text that is not base64."""
    return bad_request("bad_base64", f"{where}: not base64: {reason}")


def as_object(value: Any, what: str) -> dict[str, Any]:
    """Return *value*, a JSON object; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_request("malformed_request", f"{what}: must be an object")
    return value


def as_objects(value: Any, what: str) -> list[dict[str, Any]]:
    """Return *value*, a list of JSON objects; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise bad_request("malformed_request", f"{what}: must be a list of objects")
    return value


def as_text(value: Any, what: str) -> str:
    """Return *value*, a string."""
    if not isinstance(value, str):
        raise bad_request("malformed_request", f"{what}: must be a string")
    return value


def as_flag(value: Any, what: str) -> bool:
    """Return *value*, true or false; None is false."""
    if value is not None and not isinstance(value, bool):
        raise bad_request("malformed_request", f"{what}: must be true or false")
    return bool(value)


def as_count(value: Any, what: str, least: int = 0) -> int:
    """Return *value*, a whole number of at least *least*; true, 1.0 and "1" are none."""
    if type(value) is not int or value < least:
        raise bad_request("malformed_request", f"{what}: must be a whole number, {least} or more")
    return value


def unique_name(item: dict[str, Any], what: str, known: tuple[str, ...], seen: set[str]) -> str:
    """Return the name of *item*, one of *known* and not yet in *seen*, to which it is added."""
    name = as_text(item.get("name"), f"{what}.name")
    if name not in known:
        raise bad_request(f"unknown_{what}", f"no {what} {name[:100]!r}; there is: {', '.join(known)}")
    if name in seen:
        raise bad_request(f"duplicate_{what}", f"{what} {name!r} stands there twice")
    seen.add(name)
    return name
