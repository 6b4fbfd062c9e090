"""Which table of a weight file has all tensors of a network, and by which names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from sopdeploy.errors import WeightsError
from sopdeploy.weights.tensor_files import COUNTERS, find_wrappers, without_wrappers

_MAX_PREFIXES = 1_000  # that are tried for a table


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """How names of a table differ from those of a network, once *wrappers* are left out of both.

    A name of the network without *added*, parts with which all its names begin, is a name of the
    table without *prefix*.
    """

    prefix: str
    added: str
    wrappers: frozenset[str]

    def find(self, names: Iterable[str], table: Iterable[str]) -> dict[str, str]:
        """Map *names* of the network to their names in the *table*, without names that the table lacks."""
        stored = {without_wrappers(name, self.wrappers): name for name in table}
        sources = {
            name: self.prefix + without_wrappers(name, self.wrappers).removeprefix(self.added)
            for name in names
        }
        return {name: stored[source] for name, source in sources.items() if source in stored}


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFit:
    """How the tensors of a table fit a network.

    *sources* maps names of the network to those in the table. *missing* are names of the
    network that the table lacks, without counters.
    """

    table: str
    naming: Naming
    sources: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the value of `weights_key` that chooses this table and prefix; "." if there is neither."""
        return ".".join(filter(None, (self.table, self.naming.prefix.rstrip(".")))) or "."


def find_fits(
    table: str, entries: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> list[TableFit]:
    """List the ways in which *entries* of the table *table* have all tensors *expected*.

    The file may have a prefix in front of the names of the network. Or the file is that of another
    network that this one wraps: then it may lack the parts with which all names of this one begin.
    If no way is complete, the list has the one with the most tensors.
    """
    # The names in the file, and those of the network that must be there, without wrappers.
    stored = tensors_of(entries)
    wrappers = find_wrappers(expected, stored)
    names_in_file = dict.fromkeys(without_wrappers(name, wrappers) for name in stored)
    required = [
        without_wrappers(name, wrappers) for name in expected if not name.endswith(COUNTERS)
    ]
    required = required or [""]  # a network without tensors: a name that no file has

    # How many of the required names the file has, by its prefix and the first parts that it lacks.
    num_in_file: dict[tuple[str, str], int] = {}
    shared = _shared_parts(required)
    for depth in range(len(shared) + 1):
        added = "".join(f"{part}." for part in shared[:depth])
        suffixes = [name.removeprefix(added) for name in required]
        for prefix in _find_prefixes(names_in_file, suffixes[0]):
            count = sum(prefix + suffix in names_in_file for suffix in suffixes)
            num_in_file[prefix, added] = count

    # All complete ways, or else the one with the most tensors.
    complete = [way for way, count in num_in_file.items() if count == len(required)]
    closest = max(num_in_file, key=num_in_file.__getitem__)
    fits = []
    for prefix, added in complete or [closest]:
        naming = Naming(prefix=prefix, added=added, wrappers=wrappers)
        sources = naming.find(expected, stored)
        missing = [
            name for name in expected if name not in sources and not name.endswith(COUNTERS)
        ]
        fits.append(
            TableFit(table=table, naming=naming, sources=sources, missing=tuple(missing))
        )

    return fits


def _find_prefixes(names_in_file: Iterable[str], name: str) -> list[str]:
    """List the prefixes, such as `model.`, that *names_in_file* may have in front of *name*.

    The first is "", then come at most `_MAX_PREFIXES` others.
    """
    prefixes = (
        name_in_file.removesuffix(name)
        for name_in_file in names_in_file
        if f".{name_in_file}".endswith(f".{name}")
    )
    others = [prefix for prefix in dict.fromkeys(prefixes) if prefix]
    return ["", *others[:_MAX_PREFIXES]]


def _shared_parts(names: Sequence[str]) -> list[str]:
    """List the parts, without the last one, with which all dotted *names* begin."""
    parts_by_depth = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = takewhile(lambda parts: len(set(parts)) == 1, parts_by_depth)
    return [parts[0] for parts in shared]


def with_key(path: Path, fits: Sequence[TableFit], key: str | None) -> Sequence[TableFit]:
    """Return those of *fits* that *key* names, all without a key; raises `WeightsError` if there is none."""
    if key is None:
        return fits

    # *key* is the full key of a fit, or else a table or a prefix alone, which several fits can have.
    fits_of_key = [fit for fit in fits if fit.key == key]
    if not fits_of_key:
        fits_of_key = [fit for fit in fits if key in (fit.table, fit.naming.prefix.rstrip("."))]

    if not fits_of_key:
        keys = dict.fromkeys(fit.key for fit in fits if fit.key != ".")
        problem = (
            f"has only {', '.join(keys)}" if keys else "is a single table of tensors; omit it"
        )
        raise WeightsError(f"{path} {problem}", setting="weights_key", value=key)
    return fits_of_key


def choose_fit(
    path: Path,
    fits: Sequence[TableFit],
    tables: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Tensor],
) -> TableFit:
    """Choose the fit without missing tensors; if there is none, the one with the most tensors.

    Of several without missing tensors, only those with the shapes of *expected* count, if there are
    any. Raises `WeightsError` if those that count take different tensors.
    """
    complete = [fit for fit in fits if not fit.missing]
    if not complete:
        return max(fits, key=lambda fit: len(fit.sources))

    # The complete fits in which all shapes are right. If there are none, all complete ones count.
    with_shapes = [
        fit
        for fit in complete
        if all(
            tables[fit.table][source].shape == expected[name].shape
            for name, source in fit.sources.items()
            if not name.endswith(COUNTERS)
        )
    ]

    # Fits that take the same tensors differ in their keys only. The last one remains, whose key has
    # most of the parts with which all names begin, such as `model.encoder` and not `model`.
    different = {
        (fit.table, *sorted(fit.sources.items())): fit for fit in with_shapes or complete
    }
    if len(different) == 1:
        return next(iter(different.values()))

    has_several_tables = len({fit.table for fit in different.values()}) > 1
    problem = (
        "several tables of tensors" if has_several_tables else "the network under several names"
    )
    keys = ", ".join(fit.key for fit in different.values())
    raise WeightsError(f"{path}: holds {problem} ({keys})", remedies={"weights_key": None})


def tensors_of(table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the entries of *table* that are tensors."""
    return {name: value for name, value in table.items() if isinstance(value, Tensor)}
