"""Read the weights of a network that the user names, without running code in their file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.base.nearest import did_you_mean
from sopdeploy.errors import WeightsError, first_line, shorten
from sopdeploy.weights.class_names import find_labels
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.tensor_files import (
    COUNTERS,
    WEIGHTS_ADVICE,
    check_tensors,
    find_tables,
    read_pytorch,
    without_wrappers,
)
from sopdeploy_export.user_network.table_fit import (
    TableFit,
    choose_fit,
    find_fits,
    tensors_of,
    with_key,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedWeights:
    """What `load_weights` read: the table, the sha256 of the file, unused entries, class names, other types."""

    table: str
    sha256: str
    ignored: tuple[str, ...]
    labels: tuple[str, ...] | None
    conversions: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say what of the file the network does not take, and what it converts."""
        lines = []
        if self.ignored:
            entries = "entry" if len(self.ignored) == 1 else "entries"
            names = shorten(self.ignored)
            lines.append(f"ignored {len(self.ignored)} {entries} of the weight file: {names}")
        lines += self.conversions
        return tuple(lines)


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
    network: nn.Module,
    file: Path | WeightContent,
    key: str | None = None,
    *,
    ignore: Sequence[str] = (),
    training_only: Sequence[str] = (),
) -> LoadedWeights:
    """Load *file* into *network*; it must have all tensors of the network, in the same shapes.

    The file may have several tables of tensors, and its names a prefix such as `model.`. The
    table and the prefix are chosen that have all tensors of the network. If several do, *key*
    must name one, such as `model_ema` or `encoder_q`. If none does, all tables together are tried
    as one.

    Counters of batch norms may be missing; then the network keeps its own. Tensors beside the network,
    such as the weights of a loss, are ignored. Tensors inside of it, for which it has no place, are
    ignored only if they or the parts that they are in match *ignore*, names or patterns such as
    `aux*`, or *training_only*, parts that will be removed. A layer gets its extra state, which need
    not be a tensor. After loading, the network must have exactly these
    tensors, which is checked because it can define itself how it is loaded. Raises `WeightsError`
    for a file that cannot be read or does not fit.
    """
    weights = read_weights(file) if isinstance(file, Path) else file
    path = weights.path
    state = _own_state(network, path)
    expected = tensors_of(state)

    # Choose a table of the file, and the naming with which it fits the network.
    tables = dict(find_tables(weights.content))
    if not tables:
        raise WeightsError(f"{path}: contains no table of tensors; {WEIGHTS_ADVICE}")
    fits = [fit for name in tables for fit in find_fits(name, tables[name], expected)]
    joined = set[str]()  # tables that are made of others
    if all(fit.missing for fit in fits) and len(tables) > 1:
        # Each table may hold one part of the network, so try all as one. A table can have the name "".
        tables[""] = {
            f"{table_name}.{name}".strip("."): value
            for table_name, table in tables.items()
            for name, value in table.items()
        }
        fits += [fit for fit in find_fits("", tables[""], expected) if not fit.missing]
        joined.add("")
    fit = choose_fit(path, with_key(path, fits, key), tables, expected)
    if fit.missing:
        raise _error_of_missing(path, fit, tables[fit.table], len(expected))

    # The tensors of the table, in the shapes of the network, and the extra state of layers.
    table = tables[fit.table]
    tensors = check_tensors(path, {name: table[source] for name, source in fit.sources.items()})
    tensors = _in_shapes_of(expected, tensors, path)
    extra = {name: value for name, value in state.items() if name not in expected}
    extra_sources = fit.naming.find(extra, table)
    extra |= {name: table[source] for name, source in extra_sources.items()}

    # What is left must not belong to a richer network than this one. It may be another copy of it.
    used = {*fit.sources.values(), *extra_sources.values()}
    ignored = {name: value for name, value in table.items() if name not in used}
    copies = {
        source
        for other in fits
        if other.table == fit.table and not other.missing
        for source in other.sources.values()
    }
    left = {name: value for name, value in tensors_of(ignored).items() if name not in copies}
    inside = _tensors_inside(network, fit, left, is_joined=fit.table in joined)
    _check_patterns(path, ignore, ignored, inside)
    patterns = (*ignore, *training_only)
    _check_ignored(network, path, [tensor for tensor in inside if not tensor.matches(patterns)])

    conversions = _describe_conversions(expected, tensors)
    _load_and_compare(network, path, {**expected, **tensors}, extra)
    return LoadedWeights(
        table=fit.table,
        sha256=weights.sha256,
        ignored=tuple(ignored),
        labels=weights.labels,
        conversions=conversions,
    )


def _error_of_missing(
    path: Path, fit: TableFit, table: Mapping[str, Any], num_expected: int
) -> WeightsError:
    """Return the error of a *table* without some of the *num_expected* tensors of the network.

    It names what the file has in the module of the first missing one, if the network has no place for
    that: pruning, weight norm and adapters store a weight as several tensors of other names.
    """
    missing = fit.missing[0]
    problem = f"{path}: {missing} is missing"

    module = without_wrappers(missing.rpartition(".")[0], fit.naming.wrappers)
    in_file = f"{fit.naming.prefix}{module.removeprefix(fit.naming.added)}."
    used = {*fit.sources.values()}
    others = [
        name
        for name in tensors_of(table)
        if without_wrappers(name, fit.naming.wrappers).startswith(in_file) and name not in used
    ]
    if module and others:
        return WeightsError(
            f"{problem}, and the network has no place for {shorten(others)}: build the network with what was "
            "added in training (pruning, weight norm, adapters), remove that before you save the weights, or "
            "check the network and its options"
        )
    return WeightsError(
        f"{problem}; {len(fit.sources)} of {num_expected} tensors fit: check the network and its options, or "
        "choose another table of weights"
    )


def _describe_conversions(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Say from which floating-point types *tensors* of the file become the *expected* ones, of float32."""
    others = (
        str(tensor.dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dtype != expected[name].dtype == torch.float32
    )
    types = ", ".join(sorted(set(others)))
    return (f"converted the weights of the file from {types} to float32",) if types else ()


def _in_shapes_of(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Return *tensors* in the shapes of the *expected* ones; raise `WeightsError` if a shape differs.

    Only a counter, which some files have in the shape (1,), is reshaped.
    """
    reshaped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shape = expected[name].shape
        if name.endswith(COUNTERS) and tensor.numel() == 1:
            reshaped[name] = tensor.reshape(shape)
        elif tensor.shape == shape:
            reshaped[name] = tensor
        else:
            # In the last layer, only the number of classes differs.
            is_of_classes = name == [*expected][-1] or name.endswith(("weight", "bias"))
            is_of_classes &= tensor.ndim > 0 and tensor.shape[1:] == shape[1:]
            raise WeightsError(
                f"{path}: {name} is {tuple(tensor.shape)} in the file and {tuple(shape)} in the network; "
                "check its options",
                remedies={"option": f"num_classes={len(tensor)}"} if is_of_classes else None,
            )
    return reshaped


def _own_state(network: nn.Module, path: Path) -> dict[str, Any]:
    """Return the state dict of *network*, as `nn.Module` and not as its own class defines it."""
    try:
        return dict(nn.Module.state_dict(network))
    except Exception as error:  # of a part that defines its state dict
        raise WeightsError(
            f"{path}: the network has no state dict ({first_line(error)})"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inside:
    """A tensor of the file inside a network that has no place for it.

    *name* and *place* are its names in the file and in the network. *owner* names the innermost
    module of the network that it would be in.
    """

    name: str
    place: str
    owner: str
    tensor: Tensor

    def matches(self, patterns: Sequence[str]) -> bool:
        """Tell whether the tensor, or a part that it is in, matches one of *patterns* by one of its names."""
        return _matches(self.name, patterns) or _matches(self.place, patterns)


def _tensors_inside(
    network: nn.Module, fit: TableFit, ignored: Mapping[str, Tensor], *, is_joined: bool
) -> list[_Inside]:
    """List those of the *ignored* tensors of the file whose names extend the name of a module of *network*.

    Counters are left out and, if the table of *fit* *is_joined* from several ones, tensors of those
    that *network* takes nothing from.
    """
    wrappers = fit.naming.wrappers
    owners = _modules_by_file_name(fit, dict(network.named_modules(remove_duplicate=False)))
    tables_in_use = {source.partition(".")[0] for source in fit.sources.values()}
    inside = []

    for name, tensor in ignored.items():
        is_of_other_table = is_joined and name.partition(".")[0] not in tables_in_use
        if name.endswith(COUNTERS) or is_of_other_table:
            continue

        # The innermost module of the network that the name in the file begins with.
        outer, _, last = name.rpartition(".")
        parts = [part for part in (*without_wrappers(outer, wrappers).split("."), last) if part]
        known_depths = [
            depth for depth in range(len(parts)) if ".".join(parts[:depth]) in owners
        ]
        if known_depths:
            owner = owners[".".join(parts[: known_depths[-1]])]
            place = ".".join(filter(None, (owner, *parts[known_depths[-1] :])))
            inside.append(_Inside(name=name, place=place, owner=owner, tensor=tensor))

    return inside


def _check_patterns(
    path: Path, ignore: Sequence[str], ignored: Mapping[str, Any], inside: Sequence[_Inside]
) -> None:
    """Raise `WeightsError` for an item of *ignore* that matches no entry that the network has no place for."""
    for pattern in ignore:
        is_used = any(tensor.matches([pattern]) for tensor in inside)
        if not is_used and not any(_matches(name, [pattern]) for name in ignored):
            known = f"the network has a place for all but {shorten(list(ignored))}"
            hint = did_you_mean(pattern, list(ignored), known if ignored else "omit it")
            raise WeightsError(
                f"{path}: no such entry to ignore; {hint}", setting="ignore", value=pattern
            )


def _check_ignored(network: nn.Module, path: Path, inside: Sequence[_Inside]) -> None:
    """Raise `WeightsError` if tensors *inside* the network show that another one was trained.

    All do, because the network that was trained computed with them what *network* does not compute,
    except copies of buffers that *network* makes itself and no state dict stores.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    missing: dict[str, _Inside] = {}  # by the outermost part that the network lacks

    for each in inside:
        rest = each.place.removeprefix(f"{each.owner}.") if each.owner else each.place
        owner = modules[each.owner]
        own = {**owner._parameters, **owner._buffers}.get(rest)
        if own is None:
            depth = each.place.count(".") - rest.count(".") + 1
            while ".".join(each.place.split(".")[:depth]) in modules:  # without tensors
                depth += 1
            missing.setdefault(".".join(each.place.split(".")[:depth]), each)
        elif own.shape != each.tensor.shape or not own.cpu().equal(each.tensor.to(own.dtype)):
            problem = f"has {each.name}, but the network gives {each.place} other values"
            raise WeightsError(
                f"{path}: {problem}; check its options", remedies={"ignore": each.name}
            )

    if missing:
        places = list(missing)
        first = missing[places[0]]
        num_below = first.place.count(".") - places[0].count(".")
        part = first.name.rsplit(".", num_below)[0]
        raise WeightsError(
            f"{path}: has {first.name}, but the network is built without {shorten(places)}; check "
            "its options or, if only training needs what it lacks,",
            # completes the sentence
            remedies={"ignore": part if len(places) == 1 else "PATTERN"},
            lists={"parts": places},
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether *name*, or a part in its front such as a module, matches one of *patterns*."""
    parts = name.split(".")
    outer = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, pattern) for each in outer for pattern in patterns)


def _modules_by_file_name(fit: TableFit, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map the names that the file of *fit* has for modules of the network to their names in *modules*.

    The file names a module by what is in front of the names of its tensors. The name of the whole
    network is "" in both.
    """
    wrappers = fit.naming.wrappers
    owners: dict[str, str] = {}

    for name, source in fit.sources.items():
        parts_in_network = name.split(".")[:-1]
        parts_in_file = without_wrappers(source, wrappers).split(".")[:-1]

        # From the owner of the tensor outwards, as long as both names end in the same part.
        while ".".join(parts_in_network) in modules:
            owners.setdefault(".".join(parts_in_file), ".".join(parts_in_network))
            if not parts_in_network:
                break
            part = parts_in_network.pop()
            if parts_in_file and parts_in_file[-1] == part:
                parts_in_file.pop()
            elif part not in wrappers:  # the names in the file are without wrappers
                break

    return owners


def _load_and_compare(
    network: nn.Module, path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]
) -> None:
    """Load *tensors* and *extra* state into *network*, and check that it then has exactly these tensors.

    Raises `WeightsError` if the code of the network cannot load them, or if a tensor is missing,
    new, or has another shape or other values afterwards.
    """
    advice = "remove its load_state_dict, or let it load all tensors"

    # The network gets copies, which it may keep or change.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        network.load_state_dict({**copies, **extra})
    except Exception as error:  # the user's code
        raise WeightsError(
            f"{path}: the network cannot load it ({first_line(error)}); {advice}"
        ) from error

    # The network must now have tensors of the same names.
    loaded = tensors_of(_own_state(network, path))
    missing = [name for name in tensors if name not in loaded]
    if missing:
        raise WeightsError(f"{path}: {missing[0]} is missing after loading; {advice}")
    new = [name for name in loaded if name not in tensors]
    if new:
        raise WeightsError(f"{path}: {new[0]} is new after loading; {advice}")

    # Each must have the values of the file, in the type of the network.
    for name, tensor in loaded.items():
        expected = tensors[name]
        if expected.shape != tensor.shape:
            raise WeightsError(f"{path}: {name} has another shape after loading; {advice}")
        same_type = expected.to(tensor.dtype)
        is_equal = tensor.cpu().isclose(same_type, rtol=0, atol=0, equal_nan=True)
        if not bool(is_equal.all()):
            tied = [
                other for other, same in loaded.items() if same.data_ptr() == tensor.data_ptr()
            ]
            if len(tied) > 1:
                raise WeightsError(
                    f"{path}: {' and '.join(tied)} are one tensor in the network, and differ in the file; "
                    "build the network without tying them"
                )
            raise WeightsError(
                f"{path}: {name} has other values in the network after loading than "
                f"in the file; {advice}"
            )
