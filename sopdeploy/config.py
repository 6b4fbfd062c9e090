"""Base classes of configs, manifests, reports and options: immutable, without unknown keys."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Self, TypeAlias

import pydantic

from sopdeploy.errors import ConfigError
from sopdeploy.plugins import Registry

Count = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
PositiveRate = Annotated[float, pydantic.Field(gt=0, le=1e6)]  # float32 can represent small multiples of it
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
# The fields of a network's config or of a recipe by name, as in JSON and TOML. The model that reads them
# validates them; plug-ins add fields.
FieldValues: TypeAlias = dict[str, Any]


class StrictModel(pydantic.BaseModel):
    """An immutable pydantic model that rejects unknown keys, NaN and infinity."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the model with the fields in *update*, which are not validated.

        Raises `TypeError` for a name that is no field: pydantic would store it, and nothing would read it.
        """
        if unknown := sorted(set(update or ()) - type(self).model_fields.keys()):
            raise TypeError(f"{type(self).__name__} has no field {', '.join(unknown)}")
        return super().model_copy(update=update, deep=deep)


def with_registered(registry: Registry[type[StrictModel]], base: type[StrictModel]) -> pydantic.WrapValidator:
    """Let a field also accept the configs of plugins, which are in *registry* and subclasses of *base*.

    The type of the field is a union of other configs by `kind`; its annotation also needs `SerializeAsAny`.
    """

    def validate(value: Any, validate_union: Callable[[Any], Any]) -> Any:
        """Validate *value* by the union, or, if its `kind` is that of no member, by the registered config."""
        try:
            return validate_union(value)
        except pydantic.ValidationError as error:
            problem: Any = error.errors()[0]
            if problem["type"] != "union_tag_invalid":
                raise
            if isinstance(value, base):  # a plugin's config, which was validated when it was built
                return value
            registered = registry.find(problem["ctx"]["tag"])  # the `kind` as text, whatever its type
            if registered is None:
                raise
            return registered.model_validate(value)

    return pydantic.WrapValidator(validate)


class Options(StrictModel):
    """Options of a command and of its Python function; the text below a field describes it for both."""

    model_config = pydantic.ConfigDict(use_attribute_docstrings=True, coerce_numbers_to_str=True)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _name_problem(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        """Raise `ConfigError` for the first invalid value."""
        try:
            return validate(values)
        except pydantic.ValidationError as error:
            problem: Any = error.errors(include_url=False)[0]
            name = str(problem["loc"][0]) if problem["loc"] else None
            raise ConfigError(
                f"{problem['msg']} (got {str(problem['input'])[:80]!r})", setting=name
            ) from error


def check_format_version(found: Any, version: int, written_by: Any, unknown: Iterable[str] = ()) -> None:
    """Raise `ValueError` if a file has the format *version* *found*, not *version*, or has *unknown* fields.

    A format keeps its version when it gets optional fields: files without them get their defaults.
    *written_by* is the version of sopdeploy in the file, which can read it.
    """
    reader = f"sopdeploy {written_by}" if isinstance(written_by, str) else "a later version of sopdeploy"
    if found != version:
        raise ValueError(f"version: {found!r}, but this sopdeploy reads {version}; read it with {reader}")
    if names := sorted(unknown):
        raise ValueError(f"{names[0]}: unknown here; read it with {reader}, which wrote it")


def first_problem(error: pydantic.ValidationError) -> str:
    """Describe the first problem in *error* as `key: reason (got value)` on one line."""
    problem: Any = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key"
    reason = str(problem["msg"]).removeprefix("Value error, ")
    is_of_validator = problem["type"] == "value_error"  # a validator of this package raised it
    checked_whole_model = not problem["loc"] or isinstance(problem["input"], dict)
    if is_of_validator and checked_whole_model:  # the message names the wrong values
        return f"{where}: {reason}" if problem["loc"] else reason
    given = problem["input"]
    # Of lists and mappings, only the first items are written: they can be as large as a file or a request.
    text = reprlib.repr(given) if isinstance(given, (list, tuple, dict)) else str(given)
    return f"{where}: {reason} (got {text[:80]!r})"
