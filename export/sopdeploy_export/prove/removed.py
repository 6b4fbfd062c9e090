"""Removed: the outputs depend on nothing of a removed part.

This is proved on the graph, which shows the tensors and the modules that the outputs depend on.
Code that reads a number of a removed tensor leaves a constant in the graph; `plain_run` measures
that nothing changes while these tensors hold other values. It is not proved that removed tensors
are useless in training.

Refused: a branch times zero, and a removed weight that overlaps a kept one in memory
(`tests/attacks/planted/branches.py`).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sopdeploy.base.config import StrictModel
from sopdeploy.errors import CertificateError, shorten
from sopdeploy.models.base import is_in
from sopdeploy_export.network import modules, tensors
from sopdeploy_export.prove.constants import constants_in_use
from sopdeploy_export.prove.networks import Compared

STATEMENT = (
    "No output of the graph depends on a tensor or an operation of a removed part. Removed and kept tensors "
    "share no memory."
)
IS_PROVED = True


class TensorEntry(StrictModel):
    """One parameter or buffer, with the sha256 of its content."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


def prove_removed(trained: Compared, parts: tuple[str, ...]) -> None:
    """Raise `CertificateError` if the outputs of *trained* depend on a tensor or a module of *parts*.

    Also raises it if a tensor of *parts* shares its memory with a kept one, or with a constant of
    the graph.
    """
    _refuse_shared_memory(trained, parts)

    # Tensors that the outputs depend on; then modules whose operations they depend on.
    tensor_names = sorted(name for name in trained.needed if is_in(name, *parts))
    if tensor_names:
        raise CertificateError(
            f"the outputs depend on {shorten(tensor_names)}; omit what holds them",
            setting="training_only",
        )
    module_names = sorted(trained.root.modules & removed_modules(trained.network, parts))
    if module_names:
        raise CertificateError(
            f"the outputs depend on operations of {shorten(module_names)}: a removed part changes a "
            "value that is needed; keep it",
            setting="training_only",
        )

    # Constants of the graph over the memory of a removed tensor, such as a view in an attribute.
    removed = {name: tensor for name, tensor in trained.tensors.items() if is_in(name, *parts)}
    for _, constant in constants_in_use(trained.program):
        start, end = _address_range(constant)
        for name, tensor in removed.items():
            removed_start, removed_end = _address_range(tensor)
            if start < removed_end and removed_start < end:
                raise CertificateError(
                    f"the outputs depend on {name}, which is removed, by a view of its memory; keep it",
                    setting="training_only",
                )


def _refuse_shared_memory(trained: Compared, parts: tuple[str, ...]) -> None:
    """Raise `CertificateError` if a tensor of *parts* shares its memory with a kept tensor of *trained*.

    The error proposes a child of the part that shares nothing, if there is one.
    """
    shared = find_shared(trained.tensors, parts)
    if shared is None:
        return
    name, kept_name = shared

    # The children of the part that share nothing: one of them can be removed in place of the part.
    network = trained.network
    part = next(part for part in parts if is_in(name, part))
    is_tensor = part == name
    submodules = {} if is_tensor else network.get_submodule(part)._modules
    children = [f"{part}.{submodule}" for submodule in submodules]
    unshared = [
        child
        for child in children
        if has_tensors(network, (child,)) and not find_shared(trained.tensors, (child,))
    ]
    raise CertificateError(
        f"{name} was removed but shares its memory with {kept_name}, which was kept; name "
        "only what is in a part alone",
        remedies={"training_only": unshared[0]} if unshared else {},
    )


def removed_modules(network: nn.Module, parts: Sequence[str]) -> set[str]:
    """Return the names of the modules in *parts* of *network*, except those that it also has elsewhere."""
    named = list(modules(network))
    kept_ids = {id(module) for name, module in named if not is_in(name, *parts)}
    return {name for name, module in named if id(module) not in kept_ids}


def has_tensors(network: nn.Module, parts: tuple[str, ...]) -> bool:
    """Return whether any of *parts* of *network* has a parameter or a buffer."""
    return any(is_in(name, *parts) for name in tensors(network))


def find_shared(stored: Mapping[str, Tensor], parts: tuple[str, ...]) -> tuple[str, str] | None:
    """Name a tensor in *parts* and a kept one whose memory it overlaps; None if there are none.

    *stored* has both by name. Memory can overlap in one storage, or in two over the same memory.
    """
    kept = [
        (name, *_address_range(tensor))
        for name, tensor in stored.items()
        if not is_in(name, *parts)
    ]

    for name, tensor in stored.items():
        if not is_in(name, *parts):
            continue
        start, end = _address_range(tensor)
        for kept_name, kept_start, kept_end in kept:
            if start < kept_end and kept_start < end:
                return name, kept_name

    return None


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of *tensor* and the address after its last; (0, 0) if it is empty."""
    if not tensor.numel():
        return 0, 0

    # The position of the last element; strides are never negative.
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes_and_strides)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def list_tensors(
    trained: Compared, parts: tuple[str, ...]
) -> dict[str, tuple[TensorEntry, ...]]:
    """List the tensors of *trained* under `removed`, `kept` and `unreached`, fields of `Certificate`.

    Removed tensors are in *parts*. Of the other tensors, those that the outputs depend on, or
    that code of the network reads, are kept.
    """
    used = trained.used
    listed: dict[str, list[TensorEntry]] = {"removed": [], "kept": [], "unreached": []}

    for name, tensor in trained.tensors.items():
        if is_in(name, *parts):
            kind = "removed"
        else:
            kind = "kept" if name in used else "unreached"
        entry = TensorEntry(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            bytes=tensor.numel() * tensor.element_size(),
            sha256=trained.hashes[name],
        )
        listed[kind].append(entry)
    return {kind: tuple(entries) for kind, entries in listed.items()}


def find_unneeded(trained: Compared, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Name the outermost modules of *trained* that its outputs do not need, then further such tensors.

    A module is named if it has tensors, and the outputs need none of them and none of its
    operations. The further tensors are outside of the named modules. Left out are:

    - tensors in *parts*,
    - tensors that share memory with a needed one,
    - counters, such as `num_batches_tracked`, of modules with a needed tensor,
    - modules that hold one of these.
    """
    needed = trained.used
    owners_of_needed = {name.rpartition(".")[0] for name in needed}
    needed_memory = {address(trained.tensors[name]) for name in needed}

    # The tensors that are not needed.
    unneeded: set[str] = set()
    for name, tensor in trained.tensors.items():
        if name in needed or is_in(name, *parts) or address(tensor) in needed_memory:
            continue
        is_counter = (
            not tensor.is_floating_point() and name.rpartition(".")[0] in owners_of_needed
        )
        if not is_counter:
            unneeded.add(name)

    # The outermost modules that hold such tensors only, and of whose operations none is in the
    # graph. Outer modules come first.
    outermost: list[str] = []
    for name, module in modules(trained.network):
        is_network = name == ""
        if is_network or is_in(name, *outermost):
            continue
        names_inside = {f"{name}.{tensor_name}" for tensor_name in tensors(module)}
        runs = any(is_in(module_name, name) for module_name in trained.root.modules)
        if names_inside and names_inside <= unneeded and not runs:
            outermost.append(name)

    tensors_outside = sorted(name for name in unneeded if not is_in(name, *outermost))
    return (*outermost, *tensors_outside)


def find_shared_rests(trained: Compared, unneeded: tuple[str, ...]) -> dict[str, str]:
    """Find the parts that stay only because of tensors that the rest has, too; map each to one of these tensors.

    For example, `aux` is mapped to `aux.1.weight is fc.weight`. *unneeded* are names of
    `find_unneeded`; only the parts directly around them are looked at.
    """
    shared_rests = {}

    for part in sorted({name.rpartition(".")[0] for name in unneeded} - {""}):
        outside_by_address = {
            address(tensor): name
            for name, tensor in trained.tensors.items()
            if not is_in(name, part)
        }

        # What the outputs need of the part, with the names of the same tensors outside of it.
        needed_inside = sorted(name for name in trained.used if is_in(name, part))
        outside_names = {
            name: outside_by_address.get(address(trained.tensors[name]))
            for name in needed_inside
        }
        if needed_inside and all(outside_names.values()):
            first = needed_inside[0]
            shared_rests[part] = f"{first} is {outside_names[first]}"

    return shared_rests


def address(tensor: Tensor) -> int:
    """Return a number that tells the memory of *tensor* from any other."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata
