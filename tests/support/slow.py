"""Cases of a table that run in every run of the tests, and those that run with `--slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[str], *quick: str) -> list[Any]:
    """Return *cases* as parameters of a test, of which only *quick* run without `--slow`."""
    names = [*cases]
    assert {*quick} <= {*names}, {*quick} - {*names}
    return [
        pytest.param(name, id=name, marks=() if name in quick else pytest.mark.slow)
        for name in names
    ]
