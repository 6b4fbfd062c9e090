"""Base classes of configs, manifests, reports and options: immutable, without unknown keys."""

from collections.abc import Callable
from typing import Annotated, Any

import pydantic

from sopdeploy.plugins import Registry

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


def with_registered(registry: Registry[type[StrictModel]], base: type[StrictModel]) -> pydantic.WrapValidator:
    """Let a field whose type is a union by `kind` accept the configs in *registry*, subclasses of *base*.

    The annotation of the field also needs `SerializeAsAny`.
    """

    def validate(value: Any, validate_union: Callable[[Any], Any]) -> Any:
        """Validate *value* by the union, or, if its `kind` is that of no member, by the registered config."""
        try:
            return validate_union(value)
        except pydantic.ValidationError as error:
            problem: Any = error.errors()[0]
            if problem["type"] != "union_tag_invalid":
                raise
            if isinstance(value, base):  # a registered config, not a dict of its fields
                return value
            registered = registry.find(problem["ctx"]["tag"])  # the `kind` as text, whatever its type
            if registered is None:
                raise
            return registered.model_validate(value)

    return pydantic.WrapValidator(validate)


class Options(StrictModel):
    """Options of a command and of its Python function; the text below a field describes it for both."""

    model_config = pydantic.ConfigDict(use_attribute_docstrings=True, coerce_numbers_to_str=True)


def first_problem(error: pydantic.ValidationError) -> str:
    """Describe the first problem in *error* as `key: reason (got value)` on one line."""
    problem: Any = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key"
    of_whole_model = not problem["loc"] or isinstance(problem["input"], dict)
    if problem["type"] == "value_error" and of_whole_model:  # the reason names the wrong values itself
        reason = str(problem["ctx"]["error"])
        return f"{where}: {reason}" if problem["loc"] else reason
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason} (got {str(problem['input'])[:80]!r})"
