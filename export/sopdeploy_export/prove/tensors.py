"""Tensors: each tensor is removed, needed or neither.

Removed tensors share no memory with the others, and the graph of the trained network stays the
same while they have random values: neither an alias nor a number that code reads brings them
back. It is not proved that the removed tensors are useless in training.

Refused: a weight that a kept one overlaps in memory, or of which code reads a number
(`tests/attacks/planted/graphs.py`, `tests/attacks/planted/branches.py`).
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError, LoweringError, first_line
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.program import (
    NETWORK_PREFIX,
    Capture,
    Captures,
    export_program,
    functionalize,
)
from sopdeploy_export.network import modules, tensors
from sopdeploy_export.program_hashes import (
    describe_difference,
    fingerprint,
    hashing_again,
    program_root,
)
from sopdeploy_export.prove.networks import Compared

STATEMENT = (
    "Each tensor is removed, needed or neither; all but the removed ones have the same sha256 before and "
    "after."
)

_SEED = 20_261_126


class TensorEntry(StrictModel):
    """One parameter or buffer, with the sha256 of its content."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


def needed_tensors(network: nn.Module, reached: Set[str]) -> set[str]:
    """Return all names of the tensors of *network* that have a name in *reached*."""
    named = tensors(network)
    reached_ids = {id(tensor) for name, tensor in named.items() if name in reached}
    return {name for name, tensor in named.items() if id(tensor) in reached_ids}


def outermost_unneeded(
    network: nn.Module, needed: Set[str], parts: tuple[str, ...]
) -> tuple[str, ...]:
    """Name the outermost modules of *network* with no *needed* tensors, then the other unneeded tensors.

    What is in *parts* is left out. Counters of modules with needed tensors, such as
    `num_batches_tracked`, count as needed.
    """
    owners = {name.rpartition(".")[0] for name in needed}
    unneeded = {
        name
        for name, tensor in tensors(network).items()
        if not (name in needed or is_in(name, *parts))
        and (tensor.is_floating_point() or name.rpartition(".")[0] not in owners)
    }
    outermost: list[str] = []
    for name, module in modules(network):
        if name == "" or is_in(name, *outermost):  # "" is *network*
            continue
        inner = {f"{name}.{tensor}" for tensor in tensors(module)}
        if inner and inner <= unneeded:
            outermost.append(name)
    return (*outermost, *sorted(name for name in unneeded if not is_in(name, *outermost)))


def prove_tensors(
    trained: Compared, detached: Compared, training_only: tuple[str, ...]
) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
    """List the removed and the kept tensors of *trained*.

    Raises `CertificateError` if a tensor of *detached* is new, is changed, is in
    *training_only*, or shares memory with a removed tensor, or if a removed tensor is not in
    *training_only*.
    """
    before = trained.tensors
    after = detached.tensors
    if new := sorted(after.keys() - before.keys()):
        raise CertificateError(
            f"the detached network has a tensor {new[0]} that was never trained"
        )
    removed = [name for name in before if name not in after]
    for name in removed:
        if not is_in(name, *training_only):
            raise CertificateError(
                f"{name} was removed, but is not training-only: {list(training_only)}"
            )
    if still_held := [name for name in after if is_in(name, *training_only)]:
        raise CertificateError(
            f"{still_held[0]} is training-only, but the detached network still has it"
        )
    original = tensors(trained.original)  # contiguous copies share no memory
    check_removed_memory(
        {name: original[name] for name in removed}, {name: original[name] for name in after}
    )
    for name in after:
        if detached.hashes[name] != trained.hashes[name]:
            raise CertificateError(f"{name} changed while the network was detached")
    entries = {
        name: TensorEntry(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            bytes=tensor.numel() * tensor.element_size(),
            sha256=trained.hashes[name],
        )
        for name, tensor in before.items()
    }
    return tuple(entries[name] for name in removed), tuple(entries[name] for name in after)


@contextmanager
def randomized(network: nn.Module, parts: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Give the tensors in *parts* of *network* random values while the block runs; yield their names.

    Raises `LoweringError` for a tensor that cannot be written to.
    """
    named = {name: tensor for name, tensor in tensors(network).items() if is_in(name, *parts)}
    saved = {name: tensor.detach().clone() for name, tensor in named.items()}
    generator = torch.Generator().manual_seed(_SEED)
    try:
        for name, tensor in named.items():
            has_fractions = tensor.is_floating_point() or tensor.is_complex()
            drawn = torch.rand(tensor.shape, generator=generator)
            try:
                tensor.data.copy_(drawn if has_fractions else drawn.round())
            except (NotImplementedError, RuntimeError) as error:
                problem = f"{name} cannot be written to ({first_line(error)}); replace it by its .clone()"
                raise LoweringError(problem) from error
        with hashing_again():
            yield tuple(named)
    finally:
        for name, values in saved.items():
            named[name].data.copy_(values)


def prove_values_unread(
    network: nn.Module, parts: Sequence[str], captures: Captures, capture: Capture
) -> None:
    """Check that the graph of *network* is still that of *capture* while its *parts* have random values.

    Raises `CertificateError` if it is another one, and `LoweringError` if it cannot be
    captured.
    """
    expected_root = capture.root  # now, because a program refers to the tensors
    with randomized(network, parts) as removed:
        program = export_program(network, captures.preprocess, captures.batch)
        # None: cannot be hashed
        found = fingerprint(program)
        expected = capture.fingerprint
        hidden = [NETWORK_PREFIX + name for name in removed]
        if (
            found is not None
            and expected is not None
            and found.without(hidden) == expected.without(hidden)
        ):
            return
        root = program_root(functionalize(program, captures.batch))
    if root.sha256 != expected_root.sha256:
        difference = describe_difference(root, expected_root, "trained")
        raise CertificateError(
            f"the output depends on values in {', '.join(parts)}: with random values there, the network is "
            f"another one ({difference}); keep these parts",
            setting="training_only",
        )


def check_removed_memory(removed: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Raise `CertificateError` if a removed and a kept tensor overlap in memory, even in two storages."""
    kept_ranges = [(name, *_addresses(tensor)) for name, tensor in kept.items()]
    for name, tensor in removed.items():
        start, end = _addresses(tensor)
        for kept_name, kept_start, kept_end in kept_ranges:
            if start < kept_end and kept_start < end:
                problem = f"shares its memory with {kept_name}, which was kept"
                raise CertificateError(f"{name} was removed but {problem}")


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of *tensor* and the address after its last; (0, 0) if it is empty."""
    if not tensor.numel():
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    # Strides are never negative
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
