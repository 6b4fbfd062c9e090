"""Parts of a network: those that the user names, and those that can be removed."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from sopdeploy.errors import DetachError
from sopdeploy.models.base import is_in
from sopdeploy_export.detach.detach import has_tensors
from sopdeploy_export.detach.stubs import ReadError
from sopdeploy_export.network import modules, tensors


def removable_parts(
    network: nn.Module,
    parts: tuple[str, ...],
    check: Callable[[tuple[str, ...]], None],
    removed: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Return those of *parts* of *network* without which, and without *removed*, *check* raises no error.

    In place of a part that code reads, they are the parts inside it. Code reads a part if it
    asks for its length, for example, or for another attribute.
    """
    while parts:
        try:
            check((*removed, *parts))
        except ReadError as error:
            # or a part inside it
            read = next((name for name in parts if is_in(error.part, name)), None)
            if read is None:
                return ()
            module = network.get_submodule(read)
            children = (
                f"{read}.{name}"
                for name in {**module._modules, **module._parameters, **module._buffers}
            )
            stays = [name for name in parts if name != read]
            parts = (*stays, *(name for name in children if has_tensors(network, (name,))))
        except Exception:  # of the user's code, which may need more of a part than a stub has
            removable: tuple[str, ...] = ()
            for part in parts if len(parts) > 1 else ():
                removable += removable_parts(network, (part,), check, (*removed, *removable))
            return removable
        else:
            return parts
    return parts


def match_parts(network: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Find the outermost modules and tensors of *network* that match *patterns*.

    Raises `DetachError` for a pattern without a match.
    """
    names = [name for name, _ in modules(network) if name] + list(tensors(network))
    matched: list[str] = []
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            close = get_close_matches(pattern, names, n=1)
            children = ", ".join(name for name, _ in network.named_children())
            hint = f"did you mean {close[0]}?" if close else f"the network has {children}"
            problem = f"no such part; {hint}"
            raise DetachError(problem, setting="training_only", value=pattern)
        matched += matches
    # A match is outermost if its parent module is neither a match nor inside one.
    outer = (name for name in matched if not is_in(name.rpartition(".")[0], *matched))
    return tuple(dict.fromkeys(outer))  # each once
