"""Make a function a command: its parameters become arguments and options, its docstring the help."""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Optional,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import pydantic
import typer

from sopdeploy.base.config import Options, reason_of
from sopdeploy.base.environment import is_main_process
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.cli.console import (
    err,
    image_progress,
    one_line_errors,
    plain_text,
    print_json,
    show_steps,
    showing_causes,
    stdout_to_stderr,
)
from sopdeploy.errors import ConfigError
from sopdeploy.images.signatures import describe_skipped, noting_skipped

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Result = TypeVar("_Result")

_SECTIONS = re.compile(r"\n\n(?:Args|Options|Returns|Raises|Examples):\n")
_PARAMETER = re.compile(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", re.MULTILINE)
_SCALARS = {bool, int, float, str, Path}
_SEQUENCES = {Iterable, Sequence, list, tuple}
# Parameters that a command sets, to show its progress
_PROGRESS = {"on_image", "on_step", "progress"}
COMMON = "Options of every command"
VERBOSITY = {
    "quiet": "Print the result and errors, but no progress and no notes.",
    "verbose": "Print more details, log lines, and where an error comes from.",
}
SET = "set"  # the option that takes what has no option of its own
# What the help shows as the value of an option or argument. Other values have the name of their type.
METAVARS = {
    "set": "KEY=VALUE",
    "option": "KEY=VALUE",
    "plain": "MODULE:NAME",
    "plain_option": "KEY=VALUE",
    "log": "FORM",
    "max_batch": "N",
    "pretrained": "WEIGHTS",
    "network": "MODULE:NAME",
    "preprocess": "RULES",
    "labels": "FILE",
    "config": "FILE",
    "keys": "FILE",
    "fit_decision": "FILE",
    "out_file": "FILE",
    "ignore": "PATTERN",
    "training_only": "PATTERN",
    "profiles": "SIZES",
    "batch": "SIZES",
    "rows": "IDS",
    "devices": "DEVICES",
    "host": "ADDRESS",
    "url": "URL",
    "force": "REASON",
    "ray": "HOST:PORT",
    "from_": "RUN",
    "wrong_labels": "RUN",
    "over": "LINK",
    "back": "LINK",
}
FOLDERS = {"data", "unknown", "calibrate", "evaluate", "photos", "kept", "repository"}


class SettingOptions(NamedTuple):
    """The options for `**settings`: `--set NAME=VALUE`, and *flags*: the type and the help by name.

    *parse* converts the texts of `--set` and the flags to keyword arguments.
    """

    parse: Callable[..., Mapping[str, Any]]
    flags: Mapping[str, tuple[Any, str]] = {}


def command(
    show: Callable[..., int | None] | None = None,
    *,
    summarize: Callable[[Any], Any] | None = None,
    options: Collection[str] = (),
    settings: SettingOptions | None = None,
    distributed: bool = False,
    examples: Sequence[str] = (),
    keys: Collection[str] = (),
) -> Callable[[_Function], _Function]:
    """Make a function a command, and leave it as it is for Python.

    The command takes

    - the positional parameters of the function as arguments, except those in *options*,
    - its keyword parameters as options; those that no option can express, such as callbacks, are
      for Python only,
    - those in *keys* and in `Options.KEYS`, which few people need, as `--set KEY=VALUE`,
    - `Options.ASSIGNED`, values that are typed so often that `--epochs 5` stands for `--set epochs=5`,
    - *settings* as options, which become keyword arguments of the function,
    - the parameters of *show*, besides the result, as options.

    Its help is the docstring of the function up to the first section, such as `Args`, and the
    *examples*, which are command lines. The examples of the docstring are for Python.

    *show* prints the result. With `--json`, the command prints what *summarize* selects of it as
    JSON, and the exit code is 0. If *show* has a parameter `as_json`, it prints text or JSON
    itself. The number that *show*, or without it the function, returns is the exit code. A user
    error is one line and exit code 2. If torchrun starts several processes of a *distributed*
    command, only the first one shows the result.
    """

    def decorate(function: _Function) -> _Function:
        """Set `function.run_command`, which Typer calls with the values of arguments and options."""
        rare = {
            name: inspect.signature(function).parameters[name].annotation
            for name in (*keys, *getattr(function, "keys", ()))
        }
        assigned = getattr(function, "assigned", {})
        parameters = _declare_parameters(function, options, hidden=rare)
        parameters += _declare_assignments(settings, rare, assigned)
        parameters += _declare_common(has_json=show is not None)

        def run(**values: Any) -> None:
            """Call *function* and show its result; Typer gives the *values* of all `parameters` by name."""
            common = {name: values.pop(name, False) for name in (*VERBOSITY, "as_json")}
            as_json = common["as_json"]

            # Run the function, with errors as one line.
            with one_line_errors(as_json, rare), ExitStack() as stack:
                values = _assign(values, settings, rare, assigned)
                if settings is not None and (common["quiet"] or common["verbose"]):
                    values.setdefault("log_level", "warning" if common["quiet"] else "debug")

                if as_json:
                    stack.enter_context(_keeping_stdout())
                if common["quiet"]:
                    stack.enter_context(_without_progress())
                if common["verbose"]:
                    stack.enter_context(showing_causes())
                skipped = stack.enter_context(noting_skipped())
                result = function(**values, **_start_progress(function, as_json, stack))

            # Show the result; of several processes, only the first does. An error is printed as
            # text even with --json, because stdout may already hold the document of the result.
            if distributed and not is_main_process():
                return
            with one_line_errors():
                exit_code = _show_result(result, show, summarize, common)
                if not common["quiet"]:
                    for folder, counts in skipped.items():
                        err.print(plain_text(f"{folder}: {describe_skipped(counts)}"))
            if exit_code:
                raise typer.Exit(exit_code)

        # Typer reads the help from the docstring, and the options from the signature.
        about = _SECTIONS.split(inspect.getdoc(function) or "")[0]
        run.__doc__ = "\n\n".join([about, *(f"Example: {line}" for line in examples)])
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        texts = _texts_of(function)
        run.keys = {name: texts[name] for name in rare}  # type: ignore[attr-defined]
        run.takes_settings = settings is not None  # type: ignore[attr-defined]
        function.run_command = run  # type: ignore[attr-defined]
        return function

    return decorate


def expand_options(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Replace each parameter of *function* that is annotated with a model of `Options` by the model's fields.

    The returned function takes the fields as keyword arguments, validates them and passes the
    models to *function*. Its signature and docstring list the fields.
    """
    # Arguments stay; each field of a model of options becomes a keyword.
    parameters: list[inspect.Parameter] = []
    option_classes: dict[str, type[Options]] = {}  # by parameter
    option_lines: list[str] = []
    headings: dict[str, str] = {}  # of groups of options in the help, by option
    keys: list[str] = []
    assigned: dict[str, tuple[str, type, str]] = {}

    for parameter in inspect.signature(function).parameters.values():
        options_class = parameter.annotation
        if not (isinstance(options_class, type) and issubclass(options_class, Options)):
            parameters.append(parameter)
            continue

        option_classes[parameter.name] = options_class
        for name, field in options_class.model_fields.items():
            option = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=field.annotation
            )
            if not field.is_required():
                option = option.replace(default=field.default)
            parameters.append(option)
            text = " ".join((field.description or "").split())
            option_lines.append(f"    {name}: {text}")
        for heading, names in options_class.GROUPS.items():
            headings |= dict.fromkeys(names, heading)
        keys += options_class.KEYS
        assigned |= options_class.ASSIGNED

    parameters.sort(key=lambda parameter: parameter.kind)  # `**settings` stays last

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> _Result:
        """Call *function* with models in place of their fields in *keywords*."""
        for name, options_class in option_classes.items():
            if isinstance(keywords.get(name), options_class):
                continue  # the caller gives the model itself
            for present, former in options_class.FORMER.items():
                if former in keywords:
                    keywords[present] = keywords.pop(former)
            fields = {
                field: keywords.pop(field)
                for field in options_class.model_fields
                if field in keywords
            }
            keywords[name] = options_class(**fields)
        return function(*args, **keywords)

    # The help and the signature show the fields in place of the models.
    call.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Options:", *option_lines])
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(call).update(headings=headings, keys=keys, assigned=assigned)
    return call


def _show_result(
    result: Any,
    show: Callable[..., int | None] | None,
    summarize: Callable[[Any], Any] | None,
    common: Mapping[str, bool],
) -> int | None:
    """Print *result*, unless the function has printed it; return the exit code, None for success.

    *show* and *summarize* are those of `command`, which get `verbose` of the *common* options if they have it.
    """
    # The function has printed its result, and returned the code; there is no --json.
    if show is None:
        exit_code: int | None = result
        return exit_code

    # *show* prints text or, if it can, also JSON.
    parameters = inspect.signature(show).parameters
    if common["as_json"] and "as_json" not in parameters:
        print_json(as_data(result if summarize is None else summarize(result)))
        return None
    return show(
        result, **{name: common[name] for name in ("as_json", "verbose") if name in parameters}
    )


def _start_progress(
    function: Callable[..., Any], as_json: bool, stack: ExitStack
) -> dict[str, Any]:
    """Show progress until *stack* ends; return the arguments by which *function* reports it (`_PROGRESS`)."""
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {}
    if "progress" in parameters:
        arguments["progress"] = not as_json
    if "on_image" in parameters:
        arguments["on_image"] = stack.enter_context(image_progress())
    if "on_step" in parameters:
        arguments["on_step"] = stack.enter_context(show_steps(function.__name__))
    return arguments


@contextmanager
def _keeping_stdout() -> Iterator[None]:
    """Keep stdout for JSON: what the block prints goes to stderr, without progress."""
    with _without_progress(), stdout_to_stderr():
        yield


@contextmanager
def _without_progress() -> Iterator[None]:
    """Print no progress and no notes on stderr."""
    was_quiet = err.quiet
    err.quiet = True
    try:
        yield
    finally:
        err.quiet = was_quiet


def _declare_assignments(
    settings: SettingOptions | None,
    rare: Mapping[str, Any],
    assigned: Mapping[str, tuple[str, type, str]],
) -> list[inspect.Parameter]:
    """Declare the flags of *settings*, `--set` for all others or for *rare* parameters, and what is *assigned*."""
    declared = []
    if settings is not None:
        for name, (value_type, text) in settings.flags.items():
            declared.append(_option(name, value_type, default=None, text=text))
        text = "Any other setting of the service; repeatable."
        declared.append(_option(SET, list[str] | None, default=None, text=text))
    elif rare:
        text = "Another option, listed below; repeatable."
        declared.append(_option(SET, list[str] | None, default=None, text=text))

    for name, (_key, scalar, text) in assigned.items():
        declared.append(_option(name, scalar | None, default=None, text=text))
    return declared


def _declare_common(*, has_json: bool) -> list[inspect.Parameter]:
    """Declare the options of every command, and `--json` of a command with a result."""
    flags = {"as_json": ("--json", "Print JSON for scripts.")} if has_json else {}
    flags |= {name: (_flag(name), text) for name, text in VERBOSITY.items()}
    return [
        _option(name, bool, default=False, text=text, flag=flag, group=COMMON)
        for name, (flag, text) in flags.items()
    ]


def _assign(
    values: dict[str, Any],
    settings: SettingOptions | None,
    rare: Mapping[str, Any],
    assigned: Mapping[str, tuple[str, type, str]],
) -> dict[str, Any]:
    """Return *values* with what `--set` gives to *rare* parameters and *settings*, and with what is *assigned*.

    Raises `ConfigError` for a name that `--set` does not have, and for a value of another type.
    """
    for name, (key, _type, _text) in assigned.items():
        if (value := values.pop(name)) is not None:
            values[SET] = [*(values[SET] or ()), f"{key}={value}"]
    if not rare and settings is None:
        return values

    assignments, rare_values = _split_keys(values.pop(SET) or (), rare, settings)
    values |= rare_values
    if settings is not None:
        flags = {flag: values.pop(flag) for flag in settings.flags}
        values |= settings.parse(assignments, **flags)
    return values


def _declare_parameters(
    function: Callable[..., Any], options: Collection[str], hidden: Collection[str] = ()
) -> list[inspect.Parameter]:
    """Declare the parameters of *function* that the command line can express, without *hidden* ones.

    Keyword parameters, and those in *options*, become options, others arguments.
    """
    texts = _texts_of(function)
    headings = getattr(function, "headings", {})  # of options in the help, by parameter
    declared = []

    for name, parameter in inspect.signature(function).parameters.items():
        value_type = _command_line_type(parameter.annotation)
        is_hidden = parameter.kind is parameter.VAR_KEYWORD or name in {*hidden, *_PROGRESS}
        if value_type is None or is_hidden:
            continue

        text = texts.get(name, "")
        if parameter.kind is parameter.KEYWORD_ONLY or name in options:
            option = _option(
                name,
                value_type,
                default=parameter.default,
                text=text,
                limits=_limits(parameter.annotation),
                group=headings.get(name),
            )
            declared.append(option)
        else:
            argument: Any = Annotated[
                value_type, typer.Argument(help=text, metavar=name.upper())
            ]
            declared.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=argument))
    return declared


def _texts_of(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring of *function* says about each of its parameters."""
    texts = _PARAMETER.findall(inspect.getdoc(function) or "")
    return {name: " ".join(text.split()) for name, text in texts}


def _split_keys(
    assignments: Sequence[str], rare: Mapping[str, Any], settings: SettingOptions | None
) -> tuple[list[str], dict[str, Any]]:
    """Return the *assignments* of *settings*, and the values of the others by the name of their parameter.

    *rare* has the types of the parameters. Raises `ConfigError` for an unknown name without *settings*, and for
    a value of another type.
    """
    others: list[str] = []
    texts: dict[str, list[str]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if name in rare and equals:
            texts.setdefault(name, []).append(text)
        elif settings is not None:
            others.append(assignment)
        else:
            hint = did_you_mean(name, [*rare], f"the names are {', '.join(rare)}")
            raise ConfigError(f"{assignment}: expected KEY=VALUE; {hint}", setting=SET)

    values: dict[str, Any] = {}
    for name, given in texts.items():
        value = given if get_origin(_without_metadata(rare[name])) in _SEQUENCES else given[-1]
        try:
            values[name] = pydantic.TypeAdapter(rare[name]).validate_python(value)
        except pydantic.ValidationError as error:
            reason = reason_of(error.errors(include_url=False)[0])
            raise ConfigError(reason, setting=name) from error
    return others, values


def _option(
    name: str,
    value_type: Any,
    default: Any,
    text: str,
    flag: str = "",
    limits: Mapping[str, Any] = {},
    group: str | None = None,
) -> inspect.Parameter:
    """Declare the option of the parameter *name*, such as `from_`, whose underscore avoids a keyword.

    *flag* is by default made of the name. *text* is the help, below the heading *group*; *limits*
    are `min` and `max`.
    """
    flag = flag or _flag(name)
    if default is True:  # the flag itself would change nothing, so its negation is added
        flag = f"{flag}/--no-{flag[2:]}"

    metavar = _metavar(name, value_type)
    annotation = Annotated[
        value_type,
        typer.Option(flag, help=text, rich_help_panel=group, metavar=metavar, **limits),
    ]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _metavar(name: str, value_type: Any) -> str | None:
    """Return what the help shows as the value of the option *name*; None lets Typer show the type."""
    if name in METAVARS:
        return METAVARS[name]
    types = set(get_args(value_type)) or {value_type}
    if name in FOLDERS:
        return "FOLDER"
    if Path in types:
        return "PATH"
    if types & {int, float}:
        return "N" if int in types else "NUMBER"
    return "NAME" if str in types else None


def _flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def _limits(annotation: Any) -> dict[str, float]:
    """Return `min` and `max`, as Typer names them, of an `Annotated[int, Field(ge=1, le=9)]`."""
    limits: dict[str, float] = {}

    for field in getattr(annotation, "__metadata__", ()):
        for bound in field.metadata:  # `Ge` or `Le`
            if hasattr(bound, "ge"):
                limits["min"] = bound.ge
            else:
                limits["max"] = bound.le
    return limits


def _command_line_type(annotation: Any) -> Any:
    """Return the type of an argument or option; None if the command line cannot express *annotation*."""
    # The types of a union, without None.
    annotation = _without_metadata(annotation)
    is_union = get_origin(annotation) in {Union, UnionType}
    parts = get_args(annotation) if is_union else (annotation,)
    members = {_without_metadata(part) for part in parts}
    is_optional = NoneType in members
    members.discard(NoneType)

    if any(get_origin(member) in _SEQUENCES for member in members):
        return list[str]
    if not all(member in _SCALARS or get_origin(member) is Literal for member in members):
        return None
    value_type = Path if Path in members else members.pop()  # a path can be any other text, too
    return Optional[value_type] if is_optional else value_type  # noqa: UP045 - of a variable


def _without_metadata(annotation: Any) -> Any:
    """Return the type T of an `Annotated[T, ...]`; other annotations remain."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def as_data(result: Any) -> Any:
    """Convert models and dataclasses to what JSON can represent."""
    if hasattr(result, "model_dump"):
        return result.model_dump(mode="json")
    if is_dataclass(result) and not isinstance(result, type):
        return asdict(result)
    return [as_data(entry) for entry in result] if isinstance(result, list | tuple) else result
