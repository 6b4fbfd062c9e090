"""Parts of a network that its output does not need."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from sopdeploy.errors import DetachError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy_export.admit.first_run import create_buffers
from sopdeploy_export.admit.network import copy_for_export
from sopdeploy_export.admit.state import check_torch_state
from sopdeploy_export.capture.deployed import compute_outputs, probe_pixels
from sopdeploy_export.capture.program import Captures
from sopdeploy_export.detach.detach import detach, has_tensors
from sopdeploy_export.detach.stubs import ReadError
from sopdeploy_export.network import modules, tensors, with_contiguous_tensors
from sopdeploy_export.prove.tensors import find_usage, outermost_unused


def unused_modules(
    network: nn.Module, preprocess: Preprocess, logits_key: str | int | None = None
) -> tuple[str, ...]:
    """Name the outermost modules of *network* that its output in eval mode does not depend on.

    `training_only` may name them. *logits_key* is the attribute, key or index of the logits, if the network
    returns more than one tensor. Raises `LoweringError` if the network cannot be captured.
    """
    check_torch_state()
    copied = with_contiguous_tensors(copy_for_export(network, "given", logits_key))
    create_buffers(copied, preprocess)
    _, unused = find_usage(copied, Captures(preprocess).of(copied).needed)
    return removable_parts(copied, outermost_unused(copied, unused), preprocess)


def removable_parts(network: nn.Module, parts: tuple[str, ...], preprocess: Preprocess) -> tuple[str, ...]:
    """Return *parts* of *network*; in place of a part that code reads, the parts inside it.

    Code reads a part if it asks for its length, for example, or for another attribute.
    """
    pixels = probe_pixels(network, preprocess)
    while parts:
        try:
            with torch.no_grad():
                compute_outputs(detach(network, parts, pixels), pixels)
        except ReadError as error:
            part = network.get_submodule(error.part)
            children = (
                f"{error.part}.{name}" for name in {**part._modules, **part._parameters, **part._buffers}
            )
            stays = [name for name in parts if name != error.part]
            parts = (*stays, *(name for name in children if has_tensors(network, (name,))))
        except Exception:  # the user's code may need more than a stub; the run of an export reports it
            return parts
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
