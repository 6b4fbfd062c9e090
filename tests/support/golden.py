"""Compare whole results with files in `tests/goldens`, which `make goldens` rewrites."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "goldens"
NEAR: dict[str, Any] = {"rel": 1e-3, "abs": 1e-3}  # processors round in other ways


def check_golden(name: str, found: Any, config: pytest.Config) -> None:
    """Fail if *found*, which JSON can hold, is not what `tests/goldens/NAME.json` has."""
    found = json.loads(json.dumps(found))
    path = FOLDER / f"{name}.json"
    if config.getoption("--rewrite-goldens"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    differences = list(_differences(found, json.loads(path.read_text(encoding="utf-8")), name))
    assert differences == []


def _differences(found: Any, expected: Any, place: str) -> Iterator[str]:
    """Yield a line for each value of *found* that is another one in *expected*."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from _differences(found.get(key), expected.get(key), f"{place}.{key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{place}[{number}]")
    elif isinstance(found, float) and isinstance(expected, float | int):
        if found != pytest.approx(expected, **NEAR):
            yield f"{place}: {found}, golden {expected}"
    elif found != expected:
        yield f"{place}: {found}, golden {expected}"
