"""Base classes of configs, manifests, reports and options: immutable, without unknown keys."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self, TypeVar

import pydantic

from sopdeploy.errors import ConfigError
from sopdeploy.plugins import Registry

_Result = TypeVar("_Result")

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
        try:
            return validate_union(value)
        except pydantic.ValidationError as problem:
            if problem.errors()[0]["type"] != "union_tag_invalid":
                raise
            if isinstance(value, base):
                return value
            registered = registry.find(value["kind"])
            if registered is None:
                raise
            return registered.model_validate(value)

    return pydantic.WrapValidator(validate)


class Options(StrictModel):
    """Options of a command and of its Python function; the text below a field describes it for both."""

    model_config = pydantic.ConfigDict(use_attribute_docstrings=True, coerce_numbers_to_str=True)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Validate *given*; raises `ConfigError` about the first invalid option."""
        try:
            return cls(**given)
        except pydantic.ValidationError as error:
            problem: Any = error.errors(include_url=False)[0]
            name = str(problem["loc"][0]) if problem["loc"] else None
            raise ConfigError(
                f"{problem['msg']} (got {str(problem['input'])[:80]!r})", setting=name
            ) from error


def expand_options(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Replace each parameter of *function* that is annotated with a model of `Options` by the model's fields.

    The returned function takes the fields as keyword arguments, validates them and passes the models to
    *function*. Its signature and docstring list the fields.
    """
    parameters: list[inspect.Parameter] = []
    models: dict[str, type[Options]] = {}
    for parameter in inspect.signature(function).parameters.values():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Options):
            model = models[parameter.name] = parameter.annotation
            parameters += [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.is_required() else field.default,
                    annotation=field.annotation,
                )
                for name, field in model.model_fields.items()
            ]
        else:
            parameters.append(parameter)
    parameters.sort(key=lambda parameter: parameter.kind)  # `**settings` stays last

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> _Result:
        for name, model in models.items():
            if not isinstance(keywords.get(name), model):
                given = {field: keywords.pop(field) for field in model.model_fields if field in keywords}
                keywords[name] = model.of(given)
        return function(*args, **keywords)

    fields = [
        f"    {name}: {' '.join((field.description or '').split())}"
        for model in models.values()
        for name, field in model.model_fields.items()
    ]
    call.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Options:", *fields])
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del call.__wrapped__
    return call


def first_problem(error: pydantic.ValidationError) -> str:
    """Describe the first problem in *error* as `key: reason (got value)` on one line."""
    problem: Any = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key"
    by_model = not problem["loc"] or isinstance(problem["input"], dict)
    if problem["type"] == "value_error" and by_model:  # raised by a validator of the whole model
        reason = str(problem["ctx"]["error"])
        return f"{where}: {reason}" if problem["loc"] else reason
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason} (got {str(problem['input'])[:80]!r})"
