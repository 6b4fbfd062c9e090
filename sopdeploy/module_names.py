"""Dotted names of a network's parts, as `named_modules` and a state dict give them."""

from collections.abc import Iterable


def is_in(name: str, part: str) -> bool:
    """Say whether the part or tensor *name* is *part* or lies in it."""
    return name == part or name.startswith(f"{part}.")


def is_in_any(name: str, parts: Iterable[str]) -> bool:
    """Say whether *name* is one of *parts* or lies in one."""
    return any(is_in(name, part) for part in parts)
