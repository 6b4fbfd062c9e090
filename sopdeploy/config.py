"""The base of every config, manifest, report and setting: frozen, and unknown keys are refused."""

from typing import Annotated, Any

import pydantic

Count = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Part = Annotated[float, pydantic.Field(ge=0, lt=1)]  # of what may not all go, such as dropout


class StrictModel(pydantic.BaseModel):
    """A value that cannot change and has no keys but the declared ones."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


def first_problem(error: pydantic.ValidationError) -> str:
    """Say the first thing wrong in *error* as `key: reason (got value)`, on one line."""
    problem: Any = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # a rule over several keys
        said = str(problem["ctx"]["error"])
        return f"{where}: {said}" if problem["loc"] else said
    return f"{where}: {problem['msg']} (got {str(problem['input'])[:80]!r})"
