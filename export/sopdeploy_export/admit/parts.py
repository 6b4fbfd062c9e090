"""The parts of a network that the user names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from sopdeploy.base.nearest import did_you_mean
from sopdeploy.errors import DetachError
from sopdeploy.models.base import is_in
from sopdeploy_export.network import modules, tensors


def match_parts(network: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Name the outermost modules and tensors of *network* that match *patterns*, such as `aux*`.

    Raises `DetachError` for a pattern without a match.
    """
    names = [name for name, _ in modules(network) if name] + list(tensors(network))
    matched: list[str] = []

    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            children = ", ".join(name for name, _ in network.named_children())
            hint = did_you_mean(pattern, names, f"the network has {children}")
            problem = f"no such part; {hint}"
            raise DetachError(problem, setting="training_only", value=pattern)
        matched += matches

    # A match is outermost if its parent module neither matches nor is inside a match.
    outer = (name for name in matched if not is_in(name.rpartition(".")[0], *matched))
    return tuple(dict.fromkeys(outer))  # each once
