"""Which tensors of a user's network its output depends on."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from sopdeploy.errors import CertificateError
from sopdeploy.models.base import is_in
from sopdeploy_export.graph import PREFIX, Captured
from sopdeploy_export.proof.hashes import program_root
from sopdeploy_export.state import modules, tensors

SHOWN = 3


class Usage(NamedTuple):
    """The names of the tensors that the output of a network depends on, and of all other tensors."""

    used: frozenset[str]
    unused: frozenset[str]


def find_usage(network: nn.Module, captured: Captured) -> Usage:
    """Find the tensors that the output of *network* depends on, according to its *captured* programs.

    Raises `CertificateError` if the programs are not deterministic or write to buffers.
    """
    programs = (captured.any_batch, captured.batch_of_one)
    reached = {name.removeprefix(PREFIX) for each in programs for name in program_root(each).state}
    named = tensors(network)
    tied = {id(named[name]) for name in reached if name in named}
    used = frozenset(name for name, tensor in named.items() if id(tensor) in tied)
    # Counters such as `num_batches_tracked` belong to modules that are used.
    owners = {name.rpartition(".")[0] for name in used}
    unused = {
        name
        for name, tensor in named.items()
        if name not in used and (tensor.is_floating_point() or name.rpartition(".")[0] not in owners)
    }
    return Usage(used, frozenset(unused))


def outermost(network: nn.Module, unused: frozenset[str]) -> tuple[str, ...]:
    """Name the outermost modules of *network* with only *unused* tensors, then the other unused tensors."""
    found: list[str] = []
    for name, module in modules(network):
        inside = {f"{name}.{inner}" if name else inner for inner in tensors(module)}
        if inside and inside <= unused and not is_in(name, *found):
            found.append(name)
    return (*found, *sorted(name for name in unused if not is_in(name, *found)))


def check_training_only(usage: Usage, training_only: Sequence[str]) -> None:
    """Raise `CertificateError` if the output depends on a tensor of the *training_only* parts."""
    reached = sorted(name for name in usage.used if is_in(name, *training_only))
    if reached:
        parts = [part for part in training_only if any(is_in(name, part) for name in reached)]
        more = f" and {len(reached) - SHOWN} more" if len(reached) > SHOWN else ""
        raise CertificateError(
            f"the output of the trained network depends on {', '.join(reached[:SHOWN])}{more}, so "
            f"{', '.join(parts)} cannot be detached; omit it",
            setting="training_only",
        )
