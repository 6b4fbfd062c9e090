"""Build a network that the user names as `module:callable`, and read its weights without running their code.

`network_builder` imports and runs the user's code. Only the command line calls it, and only for names that
the user typed: never because of a checkpoint or a bundle.
"""

import ast
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sopdeploy.checkpoint import (
    COUNTER,
    WEIGHTS_ADVICE,
    WRAPPERS,
    check_tensors,
    find_labels,
    find_tables,
    read_pytorch,
    without_wrappers,
)
from sopdeploy.errors import ConfigError, WeightsError, first_line, shorten
from sopdeploy.files import check_is_weights

# Of batch norms, `AveragedModel` and packages that count operations; no output depends on them.
COUNTERS = (COUNTER, "n_averaged", "total_ops", "total_params")
WORDS = {"true": True, "false": False}  # as in TOML
NO_LITERALS = {"none", "null", "nil", "yes", "no", "on", "off", "true", "false"}
_MAX_PREFIXES = 1_000  # that are tried for a table


def network_builder(setting: str, import_path: str, option_texts: Sequence[str]) -> Callable[[], nn.Module]:
    """Create a function that builds the network *import_path*, `package.module:callable`.

    *option_texts* are its options, as `parse_option` reads them.

    Messages say that *import_path* is the value of *setting*. Raises `ConfigError` if it cannot be imported;
    the created function raises `ConfigError` if the network cannot be built.
    """
    invalid = partial(ConfigError, setting=setting, value=import_path)
    if not all(import_path.partition(":")):  # the module, the colon or the callable is missing
        raise invalid("write package.module:callable, as in torchvision.models:googlenet")
    if "" not in sys.path:
        sys.path.insert(0, "")  # finds modules in the current folder, as `python -m` does
    try:
        builder = pkgutil.resolve_name(import_path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise invalid(f"cannot be imported ({first_line(error)}); check its name") from error
    if not callable(builder):
        raise invalid(f"is a {type(builder).__name__}, not a function or a class; name one of these")
    options = dict(map(parse_option, option_texts))
    _check_option_values(builder, options, import_path)

    def build() -> nn.Module:
        try:
            network = builder(**options)
        except (Exception, SystemExit) as error:  # the user's code
            raise invalid(f"cannot be built ({first_line(error)}); check its options") from error
        if not isinstance(network, nn.Module):
            raise invalid(f"returned a {type(network).__name__}, not a torch.nn.Module")
        if any(map(is_lazy, chain(network.parameters(), network.buffers()))):
            raise invalid("returned lazy layers without weights; run them once on an image in the function")
        return network

    return build


def parse_option(text: str) -> tuple[str, Any]:
    """Split `key=value` into the key and the value, a Python literal such as False, None, 3 or (8, 16).

    `true` and `false` are accepted, too; any other value is text. Raises `ConfigError` for another form, or
    for a value that is meant as a literal of another language.
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
            raise ConfigError(f"{text}: write True, False or None, or {quoted} for a text") from error
    return key, value


def _check_option_values(builder: Callable[..., Any], options: Mapping[str, Any], import_path: str) -> None:
    """Raise `ConfigError` for *options* that *builder* does not have, and for text in place of a number."""
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):  # as of some functions that are written in C
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.kind in kinds}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name, value in options.items():
        if name not in defaults and not takes_any:
            known = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise ConfigError(f"{import_path} has no option {name}; {known}")
        default = defaults.get(name)
        if isinstance(value, str) and isinstance(default, bool | int | float):
            raise ConfigError(
                f"{name}={value!r} is text, but its default is {default!r}; write a value of this type"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedWeights:
    """What `load_weights` read: the table, the sha256 of the file, unused tensors, and class names if any."""

    table: str
    sha256: str
    ignored: tuple[str, ...]
    labels: tuple[str, ...] | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say which tensors of the file the network has no place for."""
        if not self.ignored:
            return ()
        return (f"ignored {len(self.ignored)} tensors of the weight file: {shorten(self.ignored)}",)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TableFit:
    """How the tensors of a table fit a network, if *prefix* is removed from their names.

    *tensors* have the names of the network. *missing* are names of the network that the table lacks,
    *unknown* names after the prefix that the network lacks, and *ignored* all others of the table.
    """

    table: str
    prefix: str
    tensors: Mapping[str, Tensor]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the value of `weights_key` that chooses it."""
        return ".".join(filter(None, (self.table, self.prefix.rstrip("."))))


def load_weights(network: nn.Module, path: Path, key: str | None = None) -> LoadedWeights:
    """Load the file at *path* into *network*; the names and shapes of all tensors must match.

    The file may have several tables of tensors, and a table more tensors than the network. The table and the
    prefix such as `model.` under which all names of the network are found are chosen; if there are several,
    *key* names one, such as `model_ema` or `encoder_q`. Counters of batch norms may be missing. After
    loading, all tensors are compared with those of the file, because a network can define how it is loaded.
    Raises `WeightsError` for a file that cannot be read or does not fit.
    """
    content, digest = read_pytorch(check_is_weights(path))
    tables = find_tables(content)
    if not tables:
        raise WeightsError(f"{path}: holds no table of tensors; {WEIGHTS_ADVICE}")
    expected = _own_tensors(network, path)
    fits = [fit for name, table in tables.items() for fit in _find_fits(path, name, table, expected)]
    keys = list(dict.fromkeys(fit.key for fit in fits if fit.key))
    if key is not None:
        fits = [fit for fit in fits if key in (fit.table, fit.key, fit.prefix.rstrip("."))]
    if not fits:
        problem = f"has only {', '.join(keys)}" if keys else "is a single table of tensors; omit it"
        raise WeightsError(f"{path} {problem}", setting="weights_key", value=key)
    chosen = _choose_fit(path, fits, expected)
    num_fitting = len(expected.keys() & chosen.tensors.keys())
    advice = (
        f"{num_fitting} of {len(expected)} tensors fit: check the network and its options, or choose another "
        "table of weights"
    )
    if chosen.missing:
        raise WeightsError(f"{path}: {chosen.missing[0]} is missing; {advice}")
    for name, tensor in check_tensors(path, chosen.tensors).items():
        if tensor.shape != expected[name].shape:
            shape, expected_shape = tuple(tensor.shape), tuple(expected[name].shape)
            raise WeightsError(
                f"{path}: {name} is {shape} in the file and {expected_shape} in the network; check its "
                "options"
            )
    if chosen.unknown:
        raise WeightsError(f"{path}: the network has no {chosen.unknown[0]}; {advice}")
    _load_and_compare(network, path, {**expected, **chosen.tensors})
    labels = find_labels(content)
    return LoadedWeights(table=chosen.table, sha256=digest, ignored=chosen.ignored, labels=labels)


def _choose_fit(path: Path, fits: Sequence[_TableFit], expected: Mapping[str, Tensor]) -> _TableFit:
    """Choose the fit without missing tensors, or if there is none, the closest one of the only table.

    Of several, one with the shapes of *expected* is chosen. Raises `WeightsError` if more than one is left,
    or if all miss tensors and there are several tables.
    """
    choices = [fit for fit in fits if not fit.missing]
    with_shapes = [
        fit for fit in choices if all(x.shape == expected[name].shape for name, x in fit.tensors.items())
    ]
    choices = with_shapes or choices
    if len(choices) == 1:
        return choices[0]
    has_several_tables = len({fit.table for fit in fits}) > 1
    if not choices and not has_several_tables:
        return max(fits, key=lambda fit: len(fit.tensors))
    problem = "several tables of tensors" if has_several_tables else "the network under several names"
    names = ", ".join(dict.fromkeys(fit.key or "no prefix" for fit in choices or fits))
    raise WeightsError(f"{path}: holds {problem} ({names})", remedies={"weights_key": None})


def _own_tensors(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return the state dict of *network*, as `nn.Module` and not as its own class defines it."""
    try:
        state = nn.Module.state_dict(network)
    except Exception as error:  # of a part that defines its state dict
        raise WeightsError(f"{path}: the network has no state dict ({first_line(error)})") from error
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _load_and_compare(network: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load *tensors* into *network*, and check that it has them afterwards; raises `WeightsError`."""
    advice = "remove its load_state_dict, or let it load all tensors"
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # the network may keep or change them
    try:
        network.load_state_dict(copies)
    except Exception as error:  # the user's code
        raise WeightsError(f"{path}: the network cannot load it ({first_line(error)}); {advice}") from error
    for name, loaded in _own_tensors(network, path).items():
        expected = tensors.get(name)
        if expected is None or expected.shape != loaded.shape:
            raise WeightsError(f"{path}: {name} has another shape after loading; {advice}")
        loaded, expected = loaded.cpu(), expected.to(loaded.dtype)
        if not bool(loaded.isclose(expected, rtol=0, atol=0, equal_nan=True).all()):
            raise WeightsError(
                f"{path}: {name} has other values in the network after loading than in the file; {advice}"
            )


def _find_fits(
    path: Path, table: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[_TableFit]:
    """List the ways in which *tensors* have all *expected* names; if there is none, the closest one.

    The file may have a prefix in front of the names of the network. Or the network wraps another one, whose
    file it is: then its names may have a first part that those in the file lack.
    """
    parts = {part for name in expected for part in name.split(".")}
    # The network itself may have a part with such a name.
    named = without_wrappers(path, tensors, {part for part in WRAPPERS if part not in parts})
    required = [name for name in expected if not name.endswith(COUNTER)] or [""]  # "" is in no file
    first_parts = {f"{name.partition('.')[0]}." for name in expected}
    # How many of the required names the file has, by prefix and by first part that it lacks.
    num_found: dict[tuple[str, str], int] = {}
    for added in ("", *first_parts) if len(first_parts) == 1 else ("",):
        suffixes = [name.removeprefix(added) for name in required]
        first = suffixes[0]
        prefixes = (name.removesuffix(first) for name in named if f".{name}".endswith(f".{first}"))
        for prefix in ("", *islice(filter(None, dict.fromkeys(prefixes)), _MAX_PREFIXES)):
            num_found[prefix, added] = sum(prefix + suffix in named for suffix in suffixes)
    complete = [way for way, count in num_found.items() if count == len(required)]
    closest = max(num_found, key=num_found.__getitem__)
    return [_describe_fit(table, prefix, added, named, expected) for prefix, added in complete or [closest]]


def _describe_fit(
    table: str, prefix: str, added: str, named: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> _TableFit:
    """Describe the tensors *named*, whose names have *prefix* where the network has *added*."""
    tensors, unknown, ignored = {}, [], []
    for name, tensor in named.items():
        own = added + name.removeprefix(prefix)
        if name.startswith(prefix) and own in expected:
            is_count = own.endswith(COUNTER) and tensor.numel() == 1  # some files have counters of shape (1,)
            tensors[own] = tensor.reshape(expected[own].shape) if is_count else tensor
        elif name.startswith(prefix) and not name.endswith(COUNTERS):
            unknown.append(own)
        else:
            ignored.append(name)
    missing = [name for name in expected if name not in tensors and not name.endswith(COUNTER)]
    return _TableFit(
        table=table,
        prefix=prefix,
        tensors=tensors,
        missing=tuple(missing),
        unknown=tuple(unknown),
        ignored=tuple(ignored),
    )
