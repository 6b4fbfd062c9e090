"""Turn a function into a command: options from models, errors in one line, results as JSON."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, get_args, get_origin

import pydantic
import typer

from sopdeploy.cli.console import JsonOption, err, one_line_errors, print_json
from sopdeploy.config import Options, expand_options, with_signature

JSON_PARAMETER = inspect.Parameter(
    "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption
)


def command(
    show: Callable[..., None] | None = None, *, summarize: Callable[[Any], Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a function a command; a parameter that is annotated with `Options` becomes one option per field.

    A user error ends the command with one line and exit code 2. With *show*, which prints the returned value,
    the command has the option `--json`, which prints it as JSON instead; *summarize* selects what. Options of
    the command that *show* has as parameters are passed to it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        expanded = expand_options(function, annotate=_option)
        parameters = list(inspect.signature(expanded).parameters.values())
        if show is not None:
            parameters.append(JSON_PARAMETER)

        @functools.wraps(expanded)
        def run(**keywords: Any) -> None:
            as_json = keywords.get("as_json", False)
            with one_line_errors(as_json):
                if show is None:
                    expanded(**keywords)
                    return
                keywords.pop("as_json")
                err.quiet = as_json  # no progress
                try:
                    result = expanded(**keywords)
                finally:
                    err.quiet = False
                if as_json:
                    print_json(_as_data(result if summarize is None else summarize(result)))
                else:
                    shown = inspect.signature(show).parameters.keys() & keywords.keys()
                    show(result, **{name: keywords[name] for name in shown})

        return with_signature(run, parameters)

    return decorate


def _option(model: type[Options], name: str) -> Any:
    """Annotate a field of *model* as typer declares an option."""
    field, flag = model.model_fields[name], name.strip("_").replace("_", "-")
    annotation: Any = field.annotation
    switch = annotation is bool and field.default
    if get_origin(annotation) is tuple:
        annotation = list[get_args(annotation)[0]]  # type: ignore[misc]
    return Annotated[
        annotation,
        typer.Option(f"--{flag}/--no-{flag}" if switch else f"--{flag}", help=field.description),
    ]


def _as_data(result: Any) -> Any:
    """Convert models and dataclasses to what JSON can represent."""
    if isinstance(result, pydantic.BaseModel):
        return result.model_dump(mode="json")
    if is_dataclass(result) and not isinstance(result, type):
        return asdict(result)
    return [_as_data(entry) for entry in result] if isinstance(result, list | tuple) else result
