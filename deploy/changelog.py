"""CHANGELOG.md: what is not released yet becomes the section of a version."""

import re

NAME = "CHANGELOG.md"
HEAD = re.compile(r"^## \[Unreleased\]\n", re.MULTILINE)


def unreleased(text: str) -> str:
    """Return what *text* says of the next version; raises `ValueError` where that is nothing."""
    head = HEAD.search(text)
    if head is None:
        raise ValueError(f"{NAME}: no line `## [Unreleased]`")
    section = re.split(r"^## ", text[head.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    if not re.search(r"^- ", section, re.MULTILINE):
        raise ValueError(f"{NAME}: nothing stands under [Unreleased]; write what users see, one line each")
    return section


def released(text: str, version: str, day: str) -> str:
    """Return *text* with its unreleased lines under *version*, of *day* (ISO); raises `ValueError`."""
    unreleased(text)
    return HEAD.sub(f"## [Unreleased]\n\n## [{version}] - {day}\n", text, count=1)
