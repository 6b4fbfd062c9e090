"""Base class of configs, manifests, reports and settings: immutable, without unknown keys."""

from typing import Annotated, Any

import pydantic

Count = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
PositiveRate = Annotated[float, pydantic.Field(gt=0, le=1e6)]  # float32 can represent small multiples of it
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]


class StrictModel(pydantic.BaseModel):
    """An immutable pydantic model that rejects unknown keys, NaN and infinity."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


def first_problem(error: pydantic.ValidationError) -> str:
    """Describe the first problem in *error* as `key: reason (got value)` on one line."""
    problem: Any = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # raised by a model validator
        reason = str(problem["ctx"]["error"])
        return f"{where}: {reason}" if problem["loc"] else reason
    return f"{where}: {problem['msg']} (got {str(problem['input'])[:80]!r})"
