"""The JSON body of `/v1/classify`: one image or several as base64, or the address of one."""

from dataclasses import dataclass
from typing import Any

from sopdeploy_service import fields
from sopdeploy_service.base64_text import decode_text
from sopdeploy_service.outcome import Refusal
from sopdeploy_service.problems import RefusedError
from sopdeploy_service.strict_json import bad_request, parse

SOURCES = ("image", "images", "url")
MOST_CLASSES = 1_000_000
NO_IMAGE = Refusal("no_image", 422, "the list `images` is empty")


@dataclass(frozen=True, slots=True)
class JsonBody:
    """The *images* of a body, or the *url* of its one image; *several* is true for a list."""

    images: list[bytes]
    url: str | None
    several: bool
    top_k: int | None


def read_json(raw: bytes, max_bytes: int, max_images: int) -> JsonBody:
    """Return what the JSON document *raw* asks for; for a thread, not the event loop.

    Raises `RefusedError` where it is not of the form `{"image": ...}`, `{"images": [...]}` or `{"url": ...}`,
    each with or without `"top_k"`, or where something in it is not base64.
    """
    value = parse(raw, max_bytes)
    if not isinstance(value, dict):
        raise bad_request("malformed_request", 'the body must be an object like {"image": "<base64>"}')
    unknown = sorted(value.keys() - {*SOURCES, "top_k"})
    if unknown:
        raise bad_request(
            "malformed_request", f"unknown key {unknown[0][:100]!r}; known: {', '.join(SOURCES)}, top_k"
        )
    given = [name for name in SOURCES if name in value]
    if len(given) != 1:
        raise bad_request("malformed_request", f"give exactly one of {', '.join(SOURCES)}")
    return JsonBody(
        images=read_images(value, given[0], max_images),
        url=fields.as_text(value["url"], "url") if given == ["url"] else None,
        several=given == ["images"],
        top_k=read_top_k(value.get("top_k")),
    )


def read_images(value: dict[str, Any], given: str, max_images: int) -> list[bytes]:
    """Return the images in the key *given*; none where it is an address."""
    if given == "url":
        return []
    if given == "image":
        return [decode_text(value["image"], "image")]
    texts = value["images"]
    if not isinstance(texts, list):
        raise bad_request("malformed_request", "images: must be a list of strings of base64")
    if not texts:
        raise RefusedError(NO_IMAGE)
    if len(texts) > max_images:
        raise bad_request("too_many_images", f"images: more than {max_images}, the limit of this server")
    return [decode_text(text, f"images[{place}]") for place, text in enumerate(texts)]


def read_top_k(value: Any) -> int | None:
    """Return how many classes *value* asks for; None is no wish."""
    if value is None:
        return None
    return min(fields.as_count(value, "top_k", least=1), MOST_CLASSES)
