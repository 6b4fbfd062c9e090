"""Base64 as people really send it: data URIs, line breaks, the URL-safe alphabet, padding or none."""

import binascii

from sopdeploy_service.problems import RefusedError
from sopdeploy_service.strict_json import bad_request

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


def wrong(where: str, reason: str) -> RefusedError:
    """Return the error of a text that is not base64."""
    return bad_request("bad_base64", f"{where}: not base64: {reason}")
