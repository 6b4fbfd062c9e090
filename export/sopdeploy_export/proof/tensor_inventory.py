"""The books of a certificate: every tensor of the trained network is removed or kept, none is both."""

from torch import Tensor, nn

from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError
from sopdeploy.models.base import Classifier
from sopdeploy.module_names import is_in_any
from sopdeploy_export.proof.graph_hash import tensor_hash


class TensorEntry(StrictModel):
    """One parameter or buffer: its name, shape, type, size in bytes and the sha256 of its content."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of *network* under every name it has."""
    return dict(network.named_parameters(remove_duplicate=False)) | dict(
        network.named_buffers(remove_duplicate=False)
    )


def build_inventory(
    trained: Classifier, lean: nn.Module
) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
    """Return what was removed and what was kept; raise where the books do not balance."""
    before, after = tensors(trained), tensors(lean)
    invented = sorted(after.keys() - before.keys())
    if invented:
        raise CertificateError(f"the detached network has a tensor {invented[0]} that was never trained")
    removed = {name: tensor for name, tensor in before.items() if name not in after}
    for name in removed:
        if not is_in_any(name, trained.training_only):
            raise CertificateError(f"{name} was removed, but {list(trained.training_only)} do not cover it")
    refuse_shared_storage(removed, {name: before[name] for name in after})
    kept = []
    for name, tensor in after.items():
        record = tensor_entry(name, tensor)
        if record != tensor_entry(name, before[name]):
            raise CertificateError(f"{name} changed while the network was detached")
        kept.append(record)
    return tuple(tensor_entry(name, tensor) for name, tensor in removed.items()), tuple(kept)


def refuse_shared_storage(removed: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Refuse a tensor that is removed under one name and kept under another."""
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in kept.items() if tensor.numel()}
    for name, tensor in removed.items():
        owner = owners.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if owner is not None:
            raise CertificateError(f"{name} was removed but shares its memory with {owner}, which was kept")


def tensor_entry(name: str, tensor: Tensor) -> TensorEntry:
    """Return the record of *tensor*."""
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.numel() * tensor.element_size(),
        sha256=tensor_hash(tensor),
    )
