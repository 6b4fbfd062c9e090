"""The compared networks: their state was checked and their tensors hashed before anything ran."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sopdeploy.errors import CertificateError
from sopdeploy.layers.normalize import IMAGES_FORMAT, images_format
from sopdeploy_export.admit.state import check_network_state
from sopdeploy_export.capture.deployed import EXPORT_EMBEDDING
from sopdeploy_export.network import tensors, unstored_buffers, with_contiguous_tensors
from sopdeploy_export.program_hashes import are_equal, copy_hashed, stored_hash, tensor_hash
from sopdeploy_export.subject import Detachment


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A network of the comparison whose state was checked; what is known of it is computed once.

    Attributes:
        role: `trained`, `detached`, `plain` or `rebuilt`.
        original: The network of the caller.
        network: *original*, or a copy with contiguous tensors if any is not.
        tensors: The tensors of *network* by name.
        hashes: The sha256 of each, before anything ran.
    """

    role: str
    original: nn.Module
    network: nn.Module
    tensors: Mapping[str, Tensor]
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, role: str, original: nn.Module, removed: tuple[str, ...] = ()) -> "Compared":
        """Prepare *original*; raises `CertificateError` for a wrong state outside of its *removed* parts."""
        check_network_state(original, role, removed)
        network = with_contiguous_tensors(original)
        named = tensors(network)
        hashes = {name: stored_hash(tensor) for name, tensor in named.items()}
        return cls(role=role, original=original, network=network, tensors=named, hashes=hashes)

    def check_unchanged(self, removed: Set[str]) -> None:
        """Raise `CertificateError` if a tensor that is not *removed* changed, also in the original network.

        Code outside of the graph may have written to it in a way that its version does not
        show.
        """
        networks = (
            [self.original] if self.network is self.original else [self.original, self.network]
        )
        for network in networks:
            current = tensors(network)
            for name in self.hashes.keys() - removed:
                if name not in current or tensor_hash(current[name]) != self.hashes[name]:
                    problem = f"{name} changed during the proof, in the {self.role} network"
                    raise CertificateError(f"{problem}; forward must not write to it")


def rename_with_prefix(
    plain: nn.Module, detached: nn.Module, rename: Callable[[str], str]
) -> Callable[[str], str]:
    """Extend *rename*, from names of *detached* to names of *plain*, by a prefix that one of them has.

    Returns *rename* itself if the names are already equal, or differ by more than a prefix.
    """
    names = set(tensors(plain))
    renamed = {rename(name) for name in tensors(detached)}
    if names == renamed or not names or not renamed:
        return rename
    # The shortest name of each network, of equal ones the first, is that of the same tensor.
    shortest, shortest_renamed = (min(sorted(group), key=len) for group in (names, renamed))
    surplus = shortest_renamed.removesuffix(shortest)
    missing = shortest.removesuffix(shortest_renamed)
    if {name.removeprefix(surplus) for name in renamed} == names:
        return lambda name: rename(name).removeprefix(surplus)
    if {missing + name for name in renamed} == names:
        return lambda name: missing + rename(name)
    return rename


def load_plain_network(detachment: Detachment, source: Compared) -> Compared:
    """Build the plain network of *detachment* and copy the weights of *source*, the detached one, into it.

    `rename` maps the name of a tensor in *source* to its name in the plain network. Buffers
    that checkpoints do not store follow from the config, so they are compared instead of
    copied. Raises `CertificateError` if such a buffer differs, or if the networks have tensors
    of other names or shapes.
    """
    if detachment.plain is None:
        raise CertificateError("there is no builder of a plain network")
    plain = detachment.plain()
    detached = source.network
    rename = rename_with_prefix(plain, detached, detachment.rename)
    embedding_layer = vars(detached).get(EXPORT_EMBEDDING)
    if embedding_layer is not None:  # *rename* takes names of tensors, such as its weight
        vars(plain)[EXPORT_EMBEDDING] = rename(f"{embedding_layer}.weight").removesuffix(
            ".weight"
        )
    vars(plain)[IMAGES_FORMAT] = images_format(detached)
    plain_tensors = tensors(plain)
    renamed = {rename(name): tensor for name, tensor in source.tensors.items()}
    if len(renamed) != len(source.tensors):
        raise CertificateError("rename gives two tensors of the trained network the same name")
    if missing := sorted(plain_tensors.keys() - renamed.keys()):
        raise CertificateError(
            f"the plain network needs {missing[0]}, which the detached one lacks"
        )
    if extra := sorted(renamed.keys() - plain_tensors.keys()):
        raise CertificateError(
            f"the detached network still has {extra[0]}, which the plain one lacks"
        )
    unstored = unstored_buffers(plain)
    with torch.no_grad():
        for name, tensor in plain_tensors.items():
            weight = renamed[name]
            if weight.shape != tensor.shape or weight.dtype != tensor.dtype:
                raise CertificateError(
                    f"{name} has a different shape or dtype in the plain network"
                )
            if name not in unstored:
                copy_hashed(weight, tensor)
            elif not are_equal(tensor, weight):
                raise CertificateError(
                    f"{name} differs from the plain network's; checkpoints do not store this buffer, "
                    "so its values must follow from the config"
                )
    plain.eval()
    return Compared.of(detachment.role, plain)
