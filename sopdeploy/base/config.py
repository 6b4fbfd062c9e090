"""Base classes of configs, manifests, reports and options: immutable, without unknown keys."""

import math
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, Self, TypeAlias, TypeVar

import pydantic
import pydantic_core

from sopdeploy.base.nearest import did_you_mean
from sopdeploy.base.plugins import OF_PAPERS, PluginRegistry
from sopdeploy.errors import ConfigError
from sopdeploy.version import __version__

Count = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
# float32 can represent small multiples of it
PositiveRate = Annotated[float, pydantic.Field(gt=0, le=1e6)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
MAX_LINE = 10_000  # characters
Text = Annotated[str, pydantic.Field(max_length=MAX_LINE)]  # a name, a version or a line
# The fields of a network's config or of a recipe by name, as in JSON and TOML. The model that
# reads them validates them; plug-ins add fields.
FieldValues: TypeAlias = dict[str, Any]
# Limits of what a model reads, unless its fields have lower ones.
MAX_ITEMS = 1_000_000  # of a list, set or dict
MAX_LEVELS = 100  # of tables
MAX_JSON_PARTS = 5_000_000  # of a document
MAX_UNKNOWN_KEYS = 1_000  # of an object; more are refused without an error for each
MAX_TEXT = 10_000_000  # characters
ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)
_NO_SCHEMAS = {"default", "metadata", "serialization"}  # parts of a core schema
MAX_SHOWN = 80  # characters of a value in a message
OLDEST = (0, 3)  # the minor version before this one: what it wrote is read
# A key of TOML with more than `MAX_LEVELS` parts, for which tomllib takes quadratic time and
# memory. No key begins at an escaped quote; a search from each of them would itself take
# quadratic time.
_KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![\w.\\-])(?:{_KEY_PART}[ \t]*+\.[ \t]*+){{{MAX_LEVELS}}}")


def parse_json(raw: bytes | str) -> Any:
    """Parse the JSON document *raw*, with at most 200 levels, which every reader and writer can handle.

    Raises `ValueError`, also for NaN and infinity, and for more than `MAX_JSON_PARTS` values
    and lists.
    """
    document = raw.encode() if isinstance(raw, str) else raw

    if count_parts(document) > MAX_JSON_PARTS:
        raise ValueError("not JSON: has too many lists, objects and values")

    try:
        values = pydantic_core.from_json(document, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error

    parts = [values]
    while parts:
        part = parts.pop()
        # The number 1e999, or one of hundreds of digits and .0, is infinite.
        if isinstance(part, float) and math.isinf(part):
            raise ValueError("not JSON: has a number that is too large")
        if isinstance(part, list | dict):
            parts.extend(part.values() if isinstance(part, dict) else part)
    return values


def count_parts(document: bytes) -> int:
    """Count the values and lists of the JSON *document*; commas and brackets in its strings count, too.

    A part of 2 bytes takes 100 or more in memory, and a parser a microsecond or more.
    """
    return sum(map(document.count, (b",", b"[", b"{")))


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document with at most `MAX_LEVELS` levels; raises `ValueError`."""
    if _LONG_KEY.search(text):
        raise ValueError(f"not TOML: a key has more than {MAX_LEVELS} levels")

    try:
        values = tomllib.loads(text)
    # A long number is a ValueError that is not a TOMLDecodeError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not TOML: {error}") from error

    level: list[Any] = [values]  # the tables and arrays at a depth
    for _ in range(MAX_LEVELS):
        contents = chain.from_iterable(
            part.values() if isinstance(part, dict) else part for part in level
        )
        level = [part for part in contents if isinstance(part, dict | list)]
    if level:
        raise ValueError(f"not TOML: has more than {MAX_LEVELS} levels")
    return values


class StrictModel(pydantic.BaseModel):
    """An immutable pydantic model that rejects unknown keys, NaN and infinity.

    Validation ends at the first wrong element of a list or dict, and lengths are limited.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        str_max_length=MAX_TEXT,
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> pydantic_core.CoreSchema:
        """Give all lists, sets and dicts a largest length, and end them at the first error.

        Pydantic would build an error for each wrong element, 1 kB in size: 10 GB for a file of
        16 MB.
        """
        schema = handler(source)
        waiting: list[Any] = [schema]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                # In a table of fields, `type` may be the name of one, whose value is not text.
                if part.get("type") in ("list", "tuple", "set", "frozenset", "dict"):
                    part["fail_fast"] = True
                    part.setdefault("max_length", MAX_ITEMS)
                waiting += [value for key, value in part.items() if key not in _NO_SCHEMAS]
            elif isinstance(part, list):
                waiting += part
        return schema

    @pydantic.model_validator(mode="before")
    @classmethod
    def _limit_keys(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > len(cls.model_fields) + MAX_UNKNOWN_KEYS:
            raise ValueError(f"has {len(values)} keys, more than are known")
        return values

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Validate a JSON document, which `parse_json` reads; raises `pydantic.ValidationError`."""
        try:
            values = parse_json(
                bytes(json_data) if isinstance(json_data, bytearray) else json_data
            )
        except ValueError as error:
            context = {"error": str(error)}
            problem = pydantic_core.InitErrorDetails(type="json_invalid", input="", ctx=context)
            raise pydantic.ValidationError.from_exception_data(
                cls.__name__, [problem]
            ) from error
        return cls.model_validate(values, **options)

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Self:
        """Copy the model with the fields in *update*, which are not validated.

        Raises `TypeError` for a name that is not a field: pydantic would store it, and nothing
        would read it.
        """
        if unknown := sorted(set(update or ()) - type(self).model_fields.keys()):
            raise TypeError(f"{type(self).__name__} has no field {', '.join(unknown)}")
        return super().model_copy(update=update, deep=deep)


def matching(pattern: str, noun: str) -> pydantic.AfterValidator:
    """Require that a text matches *pattern* as a whole; the error says that it is "not *noun*"."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise ValueError(f"not {noun}")
        return text

    return pydantic.AfterValidator(check)


def with_registered(
    registry: PluginRegistry[type[StrictModel]], base: type[StrictModel]
) -> pydantic.WrapValidator:
    """Let a field also accept the configs of plugins, which are in *registry* and subclasses of *base*.

    The type of the field is a union of other configs by `kind`; its annotation also needs
    `SerializeAsAny`.
    """

    def validate(value: Any, validate_union: Callable[[Any], Any]) -> Any:
        """Validate *value* by the union; if no member has its `kind`, by the registered config.

        The error of an unknown or missing `kind` names the kinds of the members and of the
        registered configs.
        """
        try:
            return validate_union(value)
        except pydantic.ValidationError as error:
            problem: Any = error.errors()[0]
            # Without a `kind`, as with one that nobody has: the error lists those of plug-ins, too.
            if problem["type"] == "union_tag_not_found" and isinstance(value, Mapping):
                return validate({**value, "kind": ""}, validate_union)
            if problem["type"] != "union_tag_invalid":
                raise
            # The config of a plug-in was validated when it was built.
            if isinstance(value, base):
                return value

            # The kind of a plug-in's config, or an error that lists all kinds.
            context = problem["ctx"]
            registered = registry.find(context["tag"])  # the `kind` as text, whatever its type
            if registered is None:
                names = ", ".join([context["expected_tags"], *map(repr, registry.names())])
                if context["tag"] in OF_PAPERS:
                    names += f"; {registry.suggest(context['tag'])}"
                elif context["tag"]:
                    names += "; choose one, or install the plug-in that has it"
                known = {**context, "expected_tags": names}
                raise pydantic_core.PydanticKnownError("union_tag_invalid", known) from error
            return registered.model_validate(value)

    return pydantic.WrapValidator(validate)


class Options(StrictModel):
    """Options of a command and of its Python function; the text below a field describes it for both.

    `GROUPS` has the fields that the help lists below a heading of their own, `KEYS` those that few people need:
    the command line takes them as `--set KEY=VALUE`. `FORMER` has names of 0.3.0, by the present name.
    `ASSIGNED` has the key, the type and the help of options that stand for `--set KEY=VALUE`.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    KEYS: ClassVar[tuple[str, ...]] = ()
    FORMER: ClassVar[Mapping[str, str]] = {}
    ASSIGNED: ClassVar[Mapping[str, tuple[str, type, str]]] = {}

    model_config = pydantic.ConfigDict(
        use_attribute_docstrings=True, coerce_numbers_to_str=True
    )

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        """Raise `ConfigError` for the first invalid value."""
        try:
            return validate(values)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = str(problem["loc"][0]) if problem["loc"] else None
            raise ConfigError(reason_of(problem), setting=name) from error


def check_format(
    version: Any, expected: int, written_by: Any, unknown: Iterable[str] = ()
) -> None:
    """Raise `OtherVersionError` if this version of sopdeploy cannot read a file.

    The format *version* of the file must be *expected*, and the file must have no
    *unknown* fields. A format keeps its version when it gets optional fields. *written_by* is
    the version that wrote the file.
    """
    reader = "a later version of sopdeploy"
    if isinstance(written_by, str):
        reader = f"sopdeploy {written_by[:MAX_SHOWN]}"

    if version != expected:
        short = _SHORTENER.repr(version)[:MAX_SHOWN]
        raise OtherVersionError(
            f"version: {short}, but this sopdeploy reads {expected}; read it with {reader}"
        )

    if names := sorted(unknown):
        raise OtherVersionError(
            f"{names[0][:MAX_SHOWN]}: unknown here; read it with {reader}, which wrote it"
        )


def check_is_readable(written_by: Any, advice: str) -> None:
    """Raise `OtherVersionError` with *advice* if a version before `OLDEST` wrote a file.

    *written_by* is the version that wrote it, if the file says so.
    """
    number = re.match(r"(\d+)[.](\d+)", written_by) if isinstance(written_by, str) else None
    if number is not None and (int(number[1]), int(number[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise OtherVersionError(
            f"sopdeploy {written_by[:MAX_SHOWN]} wrote it, and this version reads what {oldest} and "
            f"later wrote; {advice}"
        )


def writer_of(fields: Any) -> Any:
    """Return the version of sopdeploy that wrote *fields* of a file; None if they do not say it."""
    if not isinstance(fields, Mapping):
        return None
    versions = fields.get("versions")
    return (
        versions.get("sopdeploy") if isinstance(versions, Mapping) else fields.get("written_by")
    )


class OtherVersionError(ValueError):
    """A file that this version of sopdeploy cannot read, but another one may."""


def validate_format(
    model: type[ModelT], fields: Any, *, ignore_unknown: bool = False
) -> ModelT:
    """Validate the *fields* of a file of format 1, a table, as *model*.

    With *ignore_unknown*, fields that *model* does not have are ignored at every depth. This is for
    records of what has happened, which an earlier version must be able to read.

    Raises `ValueError` with one line if they are invalid. It is an `OtherVersionError` in three
    cases, in which another version of sopdeploy may read the file:

    - The format in the field `version` is not 1.
    - A field is unknown, and the file does not say that this version wrote it.
    - A value is invalid, and the file says that another version wrote it.
    """
    if not isinstance(fields, Mapping):
        raise ValueError("not a table")
    written_by = writer_of(fields)
    # In a file of this version, an unknown field is a mistake, which `model_validate` reports.
    is_own = written_by == __version__
    unknown = () if is_own or ignore_unknown else fields.keys() - model.model_fields.keys()
    check_format(fields.get("version", 1), 1, written_by, unknown)

    try:
        return model.model_validate(fields, extra="ignore" if ignore_unknown else None)
    except pydantic.ValidationError as error:
        advice = version_advice(written_by)  # empty unless another version wrote the file
        problem = OtherVersionError if advice else ValueError
        raise problem(first_problem(error, fields) + advice) from error


def version_advice(written_by: Any) -> str:
    """Return the end of an error message: the version to read a file with; empty if it is this one."""
    if not isinstance(written_by, str) or written_by == __version__:
        return ""
    return f"; read it with sopdeploy {written_by[:MAX_SHOWN]}, which wrote it (this is {__version__})"


class _Shortener(reprlib.Repr):
    """Describes values in a time that their size does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = MAX_SHOWN
        self.maxother = MAX_SHOWN

    def repr_int(self, value: int, level: int) -> str:  # noqa: ARG002 - the base class gives it
        is_long = value.bit_length() > 4 * MAX_SHOWN  # Python refuses to write some of them
        return f"a number of {value.bit_length()} bits" if is_long else str(value)

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        # The base class would sort all items before it takes the first ones.
        return super().repr_dict(dict(islice(value.items(), self.maxdict)), level)


_SHORTENER = _Shortener()


def shown(value: Any) -> str:
    """Describe *value* in a message, by at most `MAX_SHOWN` characters in quotes."""
    text = value if isinstance(value, str) else _SHORTENER.repr(value)
    return repr(text[:MAX_SHOWN])


def from_options(
    kind: type[ModelT], given: ModelT | None, options: Mapping[str, Any]
) -> ModelT:
    """Return *given*, or build a *kind* from its *options*; raises `ConfigError` for both, or for wrong ones."""
    if given is not None and options:
        raise ConfigError(f"config: give it or {', '.join(options)}, not both")
    try:
        return given or kind(**options)
    except pydantic.ValidationError as error:
        raise ConfigError(first_problem(error, options)) from error


def first_problem(error: pydantic.ValidationError, values: Any = None) -> str:
    """Describe the first problem in *error* as `key: reason (got value)` on one line.

    *values* are what was validated, if known. Then the key has only parts that occur in them.
    """
    return describe_problem(error.errors(include_url=False)[0], values)


def describe_problem(
    problem: Mapping[str, Any] | pydantic_core.ErrorDetails, values: Any = None
) -> str:
    """Describe *problem*, an entry of `pydantic.ValidationError.errors`, for the validated *values*."""
    key = _dotted_key(problem, values)
    reason = reason_of(problem)
    return f"{key}: {reason}" if key else reason


def reason_of(problem: Mapping[str, Any] | pydantic_core.ErrorDetails) -> str:
    """Return pydantic's message, or the message of a validator, with the wrong value unless it is a table."""
    message = str(problem.get("ctx", {}).get("error", problem["msg"]))[: 10 * MAX_SHOWN]
    line = "".join(letter if letter.isprintable() else " " for letter in message)

    # A table that is one of several kinds, whose `kind` is like one of them.
    if problem["type"] == "union_tag_invalid" and problem["ctx"]["tag"] not in OF_PAPERS:
        facts = problem["ctx"]
        kinds = re.findall(r"'([^']*)'", facts["expected_tags"])
        if near := did_you_mean(str(facts["tag"]), kinds):
            name = facts["discriminator"].strip("'")
            return (
                f"no {name} {shown(facts['tag'])}; {near} Choose among {facts['expected_tags']}"
            )

    value = problem["input"]
    is_table = isinstance(value, Mapping | pydantic.BaseModel)
    return line if is_table else f"{line} (got {shown(value)})"


def _dotted_key(problem: Mapping[str, Any] | pydantic_core.ErrorDetails, values: Any) -> str:
    """Return the place of *problem* in *values*, without the names of types that pydantic inserts.

    The place ("optimizer", "adamw", "lr") is the key `optimizer.lr`.
    """
    place = problem["loc"]
    if values is None:
        keys = [part for part in place if "[" not in str(part)]
        return ".".join(str(key)[:MAX_SHOWN] for key in keys)

    keys = []
    value = values
    for part in place:
        with suppress(LookupError, TypeError):  # a name of a type leads to no value
            value = value[part]
            keys.append(part)
    if problem["type"].startswith("missing"):
        keys.append(place[-1])
    return ".".join(str(key)[:MAX_SHOWN] for key in keys)
