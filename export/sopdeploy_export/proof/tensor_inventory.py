"""The tensor inventory of a certificate: each tensor is removed or kept."""

from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError
from sopdeploy.models.base import Classifier, is_in
from sopdeploy_export.proof.graph_hash import tensor_hash


class TensorEntry(StrictModel):
    """One parameter or buffer, with the sha256 of its content."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Map every name of every parameter and buffer of *network* to its tensor."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return parameters | dict(network.named_buffers(remove_duplicate=False))


def build_inventory(
    trained: Classifier, detached: nn.Module
) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
    """List the removed and the kept tensors of *trained*.

    Raises `CertificateError` if *detached* has a new tensor, lacks one that `training_only` does not cover,
    holds a changed one, or keeps under another name the memory of a removed one.
    """
    before, after = tensors(trained), tensors(detached)
    new = sorted(after.keys() - before.keys())
    if new:
        raise CertificateError(f"the detached network has a tensor {new[0]} that was never trained")
    removed = {name: tensor for name, tensor in before.items() if name not in after}
    owners = {
        before[name].untyped_storage().data_ptr(): name for name in after if before[name].numel()
    }  # the memory of each kept tensor
    for name, tensor in removed.items():
        if not is_in(name, *trained.training_only):
            raise CertificateError(f"{name} was removed, but {list(trained.training_only)} do not cover it")
        owner = owners.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if owner is not None:
            raise CertificateError(f"{name} was removed but shares its memory with {owner}, which was kept")
    kept = []
    for name, tensor in after.items():
        entry = _entry(name, tensor)
        if entry != _entry(name, before[name]):
            raise CertificateError(f"{name} changed while the network was detached")
        kept.append(entry)
    return tuple(_entry(name, tensor) for name, tensor in removed.items()), tuple(kept)


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.numel() * tensor.element_size(),
        sha256=tensor_hash(tensor),
    )
