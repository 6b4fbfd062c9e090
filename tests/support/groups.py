"""Cases of a table that only `make test-all` runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(cases: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Return the *cases* of a parametrized test by their names; those that are not *quick* are marked slow."""
    return [
        case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases
    ]
