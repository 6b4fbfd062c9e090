"""Check the arguments of public functions from Python, as the command line checks its options."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import pydantic

from sopdeploy.base.config import reason_of
from sopdeploy.errors import ConfigError

_Result = TypeVar("_Result")


class _Expected(NamedTuple):
    """The type of an argument, and whether it may be a sequence."""

    adapter: pydantic.TypeAdapter[Any]
    may_be_sequence: bool


def checking_arguments(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Check texts, numbers, paths and sequences of them before *function* is called.

    The returned function raises `ConfigError` for a value of another type. It does not check
    options, which are models, and objects such as networks and callbacks.
    """
    # `expand_options` replaces parameters by others, which it checks.
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    types = {
        name: _Expected(
            pydantic.TypeAdapter(parameter.annotation),
            _may_be_sequence(parameter.annotation),
        )
        for name, parameter in parameters.items()
        if _is_plain(parameter.annotation)
    }

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> _Result:
        """Call *function* with values of the types of its parameters."""
        named = [
            _convert(types.get(name), name, value)
            for name, value in zip(parameters, args, strict=False)
        ]
        others = args[len(named) :]  # too many, which Python itself reports
        checked = {
            name: _convert(types.get(name), name, value) for name, value in keywords.items()
        }
        return function(*named, *others, **checked)

    return call


def _is_plain(annotation: Any) -> bool:
    """Tell whether *annotation* consists of texts, numbers, paths and sequences of them."""
    kind = get_origin(annotation) or annotation
    if kind is Annotated:
        return _is_plain(get_args(annotation)[0])
    if kind in (Union, UnionType, Sequence):
        return all(map(_is_plain, get_args(annotation)))
    return kind in (bool, int, float, str, Path, NoneType)


def _may_be_sequence(annotation: Any) -> bool:
    """Tell whether *annotation*, of which `_is_plain` is true, is a sequence or a union with one."""
    kind = get_origin(annotation)
    return kind is Sequence or (
        kind in (Union, UnionType) and any(map(_may_be_sequence, get_args(annotation)))
    )


def _convert(expected: _Expected | None, name: str, value: Any) -> Any:
    """Return *value* as the *expected* type; None is any type."""
    if expected is None:
        return value

    # What a function accepts, but pydantic does not: other paths, and arrays, sets and iterators.
    if expected.may_be_sequence and not isinstance(value, str | bytes):
        with suppress(TypeError):  # it is a single value
            value = [_usual_path(each) for each in value]
    value = _usual_path(value)

    try:
        return expected.adapter.validate_python(value)
    except pydantic.ValidationError as error:
        reason = reason_of(error.errors(include_url=False)[0])
        raise ConfigError(reason, setting=name) from error


def _usual_path(value: Any) -> Any:
    """Return *value*, as a `Path` if it is another object that stands for a path."""
    return Path(value) if isinstance(value, os.PathLike) else value
