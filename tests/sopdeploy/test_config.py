"""Strict models: immutable, no unknown keys, one-line problems."""

import math
from typing import Any

import pydantic
import pytest

from sopdeploy.config import StrictModel, first_problem


class Inner(StrictModel):
    width: int = 1


class Outer(StrictModel):
    name: str
    share: float = 0.5
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


def test_models_are_immutable_and_hashable() -> None:
    value = Outer(name="a")
    for part, field in ((value, "name"), (value.inner, "width")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(part, field, 3)
    assert {value, Outer(name="a")} == {value}


PROBLEMS: dict[str, tuple[Any, str]] = {
    "missing": ({}, "name: missing"),
    "unknown": ({"name": "a", "nmae": 3}, "nmae: unknown key"),
    "unknown inside": ({"name": "a", "inner": {"wdith": 3}}, "inner.wdith: unknown key"),
    "wrong type": (
        {"name": "a", "inner": {"width": "wide"}},
        "inner.width: Input should be a valid integer, unable to parse string as an integer (got 'wide')",
    ),
    "infinite": ({"name": "a", "share": math.inf}, "share: Input should be a finite number (got 'inf')"),
    "a long value": ({"name": "a", "share": "x\ny" * 1000}, "share: Input should be a valid number"),
    "no table": ([1, 2], "value: Input should be a valid dictionary or instance of Outer (got '[1, 2]')"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_the_first_problem_is_one_line_with_its_key(case: str) -> None:
    value, message = PROBLEMS[case]
    with pytest.raises(pydantic.ValidationError) as caught:
        Outer.model_validate(value)
    text = first_problem(caught.value)
    assert text.startswith(message)
    assert "\n" not in text
    assert len(text) < 250
