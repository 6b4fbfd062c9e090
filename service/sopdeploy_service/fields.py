"""The fields of a request's JSON, taken one by one with their types; whatever is wrong is a 400."""

from typing import Any

from sopdeploy_service.strict_json import bad_request


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
