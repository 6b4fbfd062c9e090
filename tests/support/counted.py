"""What code costs, counted instead of measured: the same on every machine, whatever else runs there."""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import pytest
from PIL import Image


class Counted(NamedTuple):
    """The calls of Python and C functions, and the most bytes that Python objects held at once."""

    calls: int
    bytes: int


def counted(function: Callable[[], object]) -> Counted:
    """Run *function* once to fill caches, then once more, and count."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    function()
    tracemalloc.start()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return Counted(calls, peak)


def record_images(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets the size of each image that Pillow makes from now on, except opened files."""
    sizes: list[tuple[int, int]] = []
    make = Image.Image._new

    def record(image: Image.Image, content: Any) -> Image.Image:
        sizes.append(content.size)
        return make(image, content)

    monkeypatch.setattr(Image.Image, "_new", record)
    return sizes
