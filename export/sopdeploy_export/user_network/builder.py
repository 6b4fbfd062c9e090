"""Build a network that the user names as `module:callable`.

`network_builder` imports and runs the user's code. Only the command line calls it, and only for
names that the user typed: never because of a checkpoint or a bundle.
"""

import ast
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sopdeploy.errors import ConfigError, first_line
from sopdeploy.nearest import did_you_mean

WORDS = {"true": True, "false": False}  # as in TOML
NO_LITERALS = {"none", "null", "nil", "yes", "no", "on", "off", "true", "false"}


def network_builder(
    setting: str, import_path: str, option_texts: Sequence[str]
) -> Callable[[], nn.Module]:
    """Create a function that builds the network *import_path*, `package.module:callable`.

    *option_texts* are its options, as `parse_option` reads them. Messages say that *import_path*
    is the value of *setting*. Raises `ConfigError` if it cannot be imported or does not have such
    options; the created function raises `ConfigError` if the network cannot be built.
    """
    invalid = partial(ConfigError, setting=setting, value=import_path)
    builder = _import_callable(import_path, invalid)
    options = dict(map(parse_option, option_texts))
    _check_option_values(builder, options, import_path)

    def build() -> nn.Module:
        try:
            network = builder(**options)
        except (Exception, SystemExit) as error:  # the user's code
            raise invalid(
                f"cannot be built ({first_line(error)}); check its options"
            ) from error
        if not isinstance(network, nn.Module):
            raise invalid(f"returned a {type(network).__name__}, not a torch.nn.Module")
        if any(map(is_lazy, chain(network.parameters(), network.buffers()))):
            raise invalid(
                "returned lazy layers without weights; run them once on an image "
                "in the function"
            )
        return network

    return build


def _import_callable(
    import_path: str, invalid: Callable[[str], ConfigError]
) -> Callable[..., Any]:
    """Import *import_path*, `package.module:callable`, also from the current folder, as `python -m` does.

    Raises what *invalid* makes of a message if this fails.
    """
    if not all(import_path.partition(":")):  # the module, the colon or the callable is missing
        raise invalid("write package.module:callable, as in torchvision.models:googlenet")

    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        imported: Any = pkgutil.resolve_name(import_path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        reason = first_line(error)
        raise invalid(
            f"cannot be imported ({reason}); {_advise_import(import_path, error)}"
        ) from error
    if not callable(imported):
        raise invalid(
            f"is a {type(imported).__name__}, not a function or a class; name one of these"
        )
    return imported


def _advise_import(import_path: str, error: BaseException) -> str:
    """Say what to do after *error*, which the import of *import_path*, `package.module:callable`, raised."""
    module_name, _, attribute = import_path.partition(":")
    wanted = ""
    known_names = []

    if isinstance(error, ModuleNotFoundError) and error.name:
        # Not the module of the user: a package that this module imports.
        if not f"{module_name}.".startswith(f"{error.name}."):
            package, _, submodule = error.name.partition(".")
            if submodule and find_spec(package) is not None:
                return f"install a release of {package} that has {submodule}"
            return f"install {package}"

        # The other modules of its package, or the packages that can be imported.
        wanted = error.name
        parent = error.name.rpartition(".")[0]
        folders = (
            getattr(sys.modules[parent], "__path__", []) if parent in sys.modules else None
        )
        prefix = f"{parent}." if parent else ""
        known_names = [module.name for module in pkgutil.iter_modules(folders, prefix)]
    elif isinstance(error, AttributeError) and module_name in sys.modules:
        wanted = attribute
        members = vars(sys.modules[module_name])
        known_names = [name for name, value in members.items() if callable(value)]

    return did_you_mean(wanted, known_names, "check its name")


def parse_option(text: str) -> tuple[str, Any]:
    """Split `key=value` into the key and the value, a Python literal such as False, None, 3 or (8, 16).

    `true` and `false` are accepted, too; any other value is text. Raises `ConfigError` for
    another form, or for a value that is meant as a literal of another language.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key.isidentifier():
        raise ConfigError(f"{text}: write key=value, for example depth=18")
    if value in WORDS:
        return key, WORDS[value]
    try:
        return key, ast.literal_eval(value)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        if value.lower() in NO_LITERALS:
            quoted = f"{key}=\"'{value}'\""
            raise ConfigError(
                f"{text}: write True, False or None, or {quoted} for a text"
            ) from error
    return key, value


def _check_option_values(
    builder: Callable[..., Any], options: Mapping[str, Any], import_path: str
) -> None:
    """Raise `ConfigError` for an option that *builder* lacks, and for a text if the default is a number.

    A truth value counts as a number. A builder that does not tell its options, such as a function
    in C, may have any.
    """
    # The options that it has, with their defaults.
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):  # as of some functions that are written in C
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.kind in kinds
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    for name, value in options.items():
        if name not in defaults and not takes_any:
            known = f"it has {', '.join(defaults) or 'none'}"
            hint = did_you_mean(name, defaults.keys(), known)
            raise ConfigError(f"{import_path} has no option {name}; {hint}")
        default = defaults.get(name)
        if isinstance(value, str) and isinstance(default, bool | int | float):
            raise ConfigError(
                f"{name}={value!r} is text, but its default is {default!r}; write a "
                "value of this type"
            )
