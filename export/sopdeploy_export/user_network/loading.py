"""Build a network that the user names as `module:callable`, and read its weights without running their code.

`network_builder` imports and runs the user's code. Only the command line calls it, and only for
names that the user typed: never because of a checkpoint or a bundle.
"""

import ast
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sopdeploy.checkpoint import (
    COUNTERS,
    WEIGHTS_ADVICE,
    check_tensors,
    find_labels,
    find_tables,
    find_wrappers,
    read_pytorch,
    without_wrappers,
)
from sopdeploy.errors import ConfigError, WeightsError, first_line, shorten
from sopdeploy.files import check_is_weights

WORDS = {"true": True, "false": False}  # as in TOML
NO_LITERALS = {"none", "null", "nil", "yes", "no", "on", "off", "true", "false"}
_MAX_PREFIXES = 1_000  # that are tried for a table


def network_builder(
    setting: str, import_path: str, option_texts: Sequence[str]
) -> Callable[[], nn.Module]:
    """Create a function that builds the network *import_path*, `package.module:callable`.

    *option_texts* are its options, as `parse_option` reads them.

    Messages say that *import_path* is the value of *setting*. Raises `ConfigError` if it cannot
    be imported; the created function raises `ConfigError` if the network cannot be built.
    """
    invalid = partial(ConfigError, setting=setting, value=import_path)
    if not all(import_path.partition(":")):  # the module, the colon or the callable is missing
        raise invalid("write package.module:callable, as in torchvision.models:googlenet")
    if "" not in sys.path:
        sys.path.insert(0, "")  # finds modules in the current folder, as `python -m` does
    try:
        builder = pkgutil.resolve_name(import_path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        reason = first_line(error)
        raise invalid(
            f"cannot be imported ({reason}); {_advise_import(import_path, error)}"
        ) from error
    if not callable(builder):
        raise invalid(
            f"is a {type(builder).__name__}, not a function or a class; name one of these"
        )
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
                "returned lazy layers without weights; run them once on an image in the function"
            )
        return network

    return build


def _advise_import(import_path: str, error: BaseException) -> str:
    """Say what to do after *error*, with which *import_path*, `package.module:callable`, was not found."""
    module_name, _, attribute = import_path.partition(":")
    wanted = ""
    known = []
    if isinstance(error, ModuleNotFoundError) and error.name:
        if not f"{module_name}.".startswith(f"{error.name}."):  # code of the user imports it
            package, _, submodule = error.name.partition(".")
            if submodule and find_spec(package) is not None:
                return f"install a release of {package} that has {submodule}"
            return f"install {package}"
        wanted = error.name
        parent = error.name.rpartition(".")[0]
        folders = (
            getattr(sys.modules[parent], "__path__", []) if parent in sys.modules else None
        )
        known = [
            found.name
            for found in pkgutil.iter_modules(folders, f"{parent}." if parent else "")
        ]
    elif isinstance(error, AttributeError) and module_name in sys.modules:
        wanted = attribute
        known = [
            name for name, value in vars(sys.modules[module_name]).items() if callable(value)
        ]
    close = get_close_matches(wanted, known, n=1)
    return f"did you mean {close[0]}?" if close else "check its name"


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
    """Raise `ConfigError` for *options* that *builder* does not have, and for text in place of a number."""
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
            close = get_close_matches(name, defaults, n=1)
            known = f"it has {', '.join(defaults)}" if defaults else "it has none"
            known = f"did you mean {close[0]}?" if close else known
            raise ConfigError(f"{import_path} has no option {name}; {known}")
        default = defaults.get(name)
        if isinstance(value, str) and isinstance(default, bool | int | float):
            raise ConfigError(
                f"{name}={value!r} is text, but its default is {default!r}; write a value of this type"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedWeights:
    """What `load_weights` read: the table, the sha256 of the file, unused entries, and class names if any."""

    table: str
    sha256: str
    ignored: tuple[str, ...]
    labels: tuple[str, ...] | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say which entries of the file the network has no place for."""
        if not self.ignored:
            return ()
        entries = "entry" if len(self.ignored) == 1 else "entries"
        return (
            f"ignored {len(self.ignored)} {entries} of the weight file: {shorten(self.ignored)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Naming:
    """How names of a table differ from those of a network, once *wrappers* are left out of both.

    A table has *prefix* in front of them, and lacks the parts *added* with which all names of
    the network begin.
    """

    prefix: str
    added: str
    wrappers: frozenset[str]

    def find(self, names: Iterable[str], table: Iterable[str]) -> dict[str, str]:
        """Map those of *names*, of the network, that the *table* has to their names in it."""
        stored = {without_wrappers(name, self.wrappers): name for name in table}
        sources = {
            name: self.prefix + without_wrappers(name, self.wrappers).removeprefix(self.added)
            for name in names
        }
        return {name: stored[source] for name, source in sources.items() if source in stored}


@dataclass(frozen=True, kw_only=True, slots=True)
class _TableFit:
    """How the tensors of a table fit a network.

    *sources* maps names of the network to those in the table. *missing* are names of the
    network that the table lacks, without counters.
    """

    table: str
    naming: _Naming
    sources: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the value of `weights_key` that chooses it; "." for the names as they are."""
        return ".".join(filter(None, (self.table, self.naming.prefix.rstrip(".")))) or "."


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightContent:
    """What a weight file holds, its sha256, and its class names if any."""

    path: Path
    content: Any
    sha256: str
    labels: tuple[str, ...] | None


def read_weights(path: Path) -> WeightContent:
    """Read the weight file at *path*; raises `WeightsError`."""
    content, digest = read_pytorch(check_is_weights(path))
    return WeightContent(path=path, content=content, sha256=digest, labels=find_labels(content))


def load_weights(
    network: nn.Module, file: Path | WeightContent, key: str | None = None
) -> LoadedWeights:
    """Load *file* into *network*; it must have all tensors of the network, in the same shapes.

    The file may have several tables of tensors, and a table more tensors than the network. The
    table and the prefix such as `model.` under which all names of the network are found are
    chosen; if there are several, *key* names one, such as `model_ema` or `encoder_q`. Counters
    of batch norms may be missing. What the network lacks is ignored, unless a tensor shows that
    it was built with other options. A layer gets its extra state, which need not be a tensor.
    After loading, all tensors are compared with those of the file, because a network can define
    how it is loaded. Raises `WeightsError` for a file that cannot be read or does not fit.
    """
    weights = read_weights(file) if isinstance(file, Path) else file
    path = weights.path
    content = weights.content
    state = _own_state(network, path)
    expected = _tensors_of(state)
    tables = dict(find_tables(content))
    if not tables:
        raise WeightsError(f"{path}: holds no table of tensors; {WEIGHTS_ADVICE}")
    fits = [fit for name in tables for fit in _find_fits(name, tables[name], expected)]

    # Each may hold one part of the network
    if all(fit.missing for fit in fits) and len(tables) > 1:
        tables[""] = {
            f"{name}.{each}".strip("."): value
            for name, table in tables.items()
            for each, value in table.items()
        }
        fits += [fit for fit in _find_fits("", tables[""], expected) if not fit.missing]
    chosen = _choose_fit(path, _with_key(path, fits, key), tables, expected)
    if chosen.missing:
        raise WeightsError(
            f"{path}: {chosen.missing[0]} is missing; {len(chosen.sources)} of {len(expected)} tensors fit: "
            "check the network and its options, or choose another table of weights"
        )
    named = tables[chosen.table]
    tensors = check_tensors(
        path, {name: named[source] for name, source in chosen.sources.items()}
    )
    for name, tensor in tensors.items():
        # Some files have counters of shape (1,)
        if name.endswith(COUNTERS) and tensor.numel() == 1:
            tensors[name] = tensor.reshape(expected[name].shape)
        elif tensor.shape != expected[name].shape:
            shape = tuple(tensor.shape)
            expected_shape = tuple(expected[name].shape)
            raise WeightsError(
                f"{path}: {name} is {shape} in the file and {expected_shape} in the network; check its "
                "options"
            )
    extra = {name: value for name, value in state.items() if name not in expected}
    extra_sources = chosen.naming.find(extra, named)
    extra |= {name: named[source] for name, source in extra_sources.items()}
    used = {*chosen.sources.values(), *extra_sources.values()}
    ignored = {name: value for name, value in named.items() if name not in used}
    _check_ignored(network, path, chosen, _tensors_of(ignored))
    _load_and_compare(network, path, {**expected, **tensors}, extra)
    return LoadedWeights(
        table=chosen.table, sha256=weights.sha256, ignored=tuple(ignored), labels=weights.labels
    )


def _with_key(path: Path, fits: Sequence[_TableFit], key: str | None) -> Sequence[_TableFit]:
    """Return those of *fits* that *key* names; raises `WeightsError` if there is none."""
    if key is None:
        return fits
    chosen = [fit for fit in fits if fit.key == key]
    chosen = chosen or [
        fit for fit in fits if key in (fit.table, fit.naming.prefix.rstrip("."))
    ]
    if not chosen:
        keys = dict.fromkeys(fit.key for fit in fits if fit.key != ".")
        problem = (
            f"has only {', '.join(keys)}" if keys else "is a single table of tensors; omit it"
        )
        raise WeightsError(f"{path} {problem}", setting="weights_key", value=key)
    return chosen


def _choose_fit(
    path: Path,
    fits: Sequence[_TableFit],
    tables: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Tensor],
) -> _TableFit:
    """Choose the fit without missing tensors, or if there is none, the closest one.

    Of several, one with the shapes of *expected* is chosen. Raises `WeightsError` if those that
    are left take different tensors.
    """
    choices = [fit for fit in fits if not fit.missing]
    if not choices:
        return max(fits, key=lambda fit: len(fit.sources))
    with_shapes = [
        fit
        for fit in choices
        if all(
            tables[fit.table][source].shape == expected[name].shape
            for name, source in fit.sources.items()
            if not name.endswith(COUNTERS)
        )
    ]

    # One choice of tensors can have several keys; the last one names the part of the network
    # that has all.
    different = {
        (fit.table, *sorted(fit.sources.items())): fit for fit in with_shapes or choices
    }
    if len(different) == 1:
        return next(iter(different.values()))
    has_several_tables = len({fit.table for fit in different.values()}) > 1
    problem = (
        "several tables of tensors" if has_several_tables else "the network under several names"
    )
    keys = ", ".join(fit.key for fit in different.values())
    raise WeightsError(f"{path}: holds {problem} ({keys})", remedies={"weights_key": None})


def _own_state(network: nn.Module, path: Path) -> dict[str, Any]:
    """Return the state dict of *network*, as `nn.Module` and not as its own class defines it."""
    try:
        return dict(nn.Module.state_dict(network))
    except Exception as error:  # of a part that defines its state dict
        raise WeightsError(
            f"{path}: the network has no state dict ({first_line(error)})"
        ) from error


def _tensors_of(table: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in table.items() if isinstance(value, Tensor)}


def _check_ignored(
    network: nn.Module, path: Path, fit: _TableFit, ignored: Mapping[str, Tensor]
) -> None:
    """Raise `WeightsError` if *ignored* tensors show that *network* was trained with other options.

    That is a tensor for which a module has an empty place, such as the bias of a convolution
    without one, an unstored buffer with other values, and one more block of a list of blocks.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    wrappers = fit.naming.wrappers

    # Names of modules, by those in the file; the root of either is ""
    owners: dict[str, str] = {}
    for name, source in fit.sources.items():
        of_network = name.split(".")[:-1]
        of_file = without_wrappers(source, wrappers).split(".")[:-1]
        while ".".join(of_network) in modules:
            owners.setdefault(".".join(of_file), ".".join(of_network))
            if not of_network:
                break
            part = of_network.pop()
            if of_file and of_file[-1] == part:
                of_file.pop()
            elif part not in wrappers:
                break
    for name, tensor in ignored.items():
        parts = without_wrappers(name, wrappers).split(".")
        known = (
            depth
            for depth in range(len(parts) - 1, -1, -1)
            if ".".join(parts[:depth]) in owners
        )
        if name.endswith(COUNTERS) or (depth := next(known, None)) is None:
            continue
        owner = owners[".".join(parts[:depth])]
        part = parts[depth]
        module = modules[owner]
        own = {**module._parameters, **module._buffers}.get(part, ...)
        if depth < len(parts) - 1:
            is_empty = isinstance(module, nn.Sequential | nn.ModuleList) and part.isdecimal()
        else:
            is_empty = own is None or (
                isinstance(module, nn.ParameterList) and part.isdecimal()
            )
        place = f"{owner}.{part}".lstrip(".")
        problem = f"the network is built without {place}" if is_empty else ""
        if isinstance(own, Tensor) and not (
            own.shape == tensor.shape and own.cpu().equal(tensor.to(own.dtype))
        ):
            problem = f"the network gives {place} other values"
        if problem:
            advice = "check its options, or save the weights without it"
            raise WeightsError(f"{path}: has {name}, but {problem}; {advice}")


def _load_and_compare(
    network: nn.Module, path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]
) -> None:
    """Load *tensors* and *extra* state into *network*, and check that it has these tensors afterwards.

    Raises `WeightsError`.
    """
    advice = "remove its load_state_dict, or let it load all tensors"

    # The network may keep or change them
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        network.load_state_dict({**copies, **extra})
    except Exception as error:  # the user's code
        raise WeightsError(
            f"{path}: the network cannot load it ({first_line(error)}); {advice}"
        ) from error
    for name, loaded in _tensors_of(_own_state(network, path)).items():
        expected = tensors.get(name)
        if expected is None or expected.shape != loaded.shape:
            raise WeightsError(f"{path}: {name} has another shape after loading; {advice}")
        loaded, expected = loaded.cpu(), expected.to(loaded.dtype)
        if not bool(loaded.isclose(expected, rtol=0, atol=0, equal_nan=True).all()):
            raise WeightsError(
                f"{path}: {name} has other values in the network after loading than in the file; {advice}"
            )


def _find_fits(
    table: str, named: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> list[_TableFit]:
    """List the ways in which the table *named* has all tensors *expected*; if there is none, the closest one.

    The file may have a prefix in front of the names of the network. Or the network wraps
    another one, whose file it is: then the file may lack the parts with which all begin.
    """
    stored = _tensors_of(named)
    wrappers = find_wrappers(expected, stored)
    short_names = dict.fromkeys(without_wrappers(name, wrappers) for name in stored)
    # "" is in no file
    required = [
        without_wrappers(name, wrappers) for name in expected if not name.endswith(COUNTERS)
    ] or [""]
    parts_by_depth = zip(*(name.split(".")[:-1] for name in required), strict=False)
    shared = [
        parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, parts_by_depth)
    ]

    # How many of the required names the file has, by prefix and by first parts that it lacks.
    num_found: dict[tuple[str, str], int] = {}
    for depth in range(len(shared) + 1):
        added = "".join(f"{part}." for part in shared[:depth])
        suffixes = [name.removeprefix(added) for name in required]
        first = suffixes[0]
        prefixes = (
            name.removesuffix(first) for name in short_names if f".{name}".endswith(f".{first}")
        )
        for prefix in ("", *islice(filter(None, dict.fromkeys(prefixes)), _MAX_PREFIXES)):
            num_found[prefix, added] = sum(
                prefix + suffix in short_names for suffix in suffixes
            )

    # All ways that are complete, or the closest one.
    complete = [way for way, count in num_found.items() if count == len(required)]
    closest = max(num_found, key=num_found.__getitem__)
    fits = []
    for prefix, added in complete or [closest]:
        naming = _Naming(prefix=prefix, added=added, wrappers=wrappers)
        sources = naming.find(expected, stored)
        missing = [
            name for name in expected if name not in sources and not name.endswith(COUNTERS)
        ]
        fits.append(
            _TableFit(table=table, naming=naming, sources=sources, missing=tuple(missing))
        )
    return fits
