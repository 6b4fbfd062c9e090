"""Serialize the certified network as `network.pt2`, a torch.export file.

torch.export records the source lines of every operation and may store tensors that the program does not need.
Both are removed. The serialized bytes are then verified: loaded again, they have the certified graph hash
and no tensors beside the kept ones, each in its own storage. The same program gives the same bytes.
"""

import io
import zipfile

import torch
from torch import fx
from torch.export import ExportedProgram

from sopdeploy.bundle.folder import PROGRAM
from sopdeploy.errors import CertificateError
from sopdeploy_export.graph import NETWORK_PREFIX
from sopdeploy_export.program_hashes import program_root, tensor_hash
from sopdeploy_export.proof.certificate import NetworkProof

SOURCE_KEYS = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")  # may contain file paths
NORMALIZE_PREFIX = "normalise."  # tensors of the wrapper module, which are not part of the network
_WEIGHTS = "/data/weights/weight_"


def serialize_program(program: ExportedProgram, proof: NetworkProof) -> bytes:
    """Serialize the detached *program* without source locations, and verify the bytes.

    *program* is modified. Raises `CertificateError` as `check_program` does.
    """
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for key in SOURCE_KEYS:
                    node.meta.pop(key, None)
    program.example_inputs = None  # would be pickled into the file
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    check_program(content, proof)
    return content


def check_program(content: bytes, proof: NetworkProof) -> None:
    """Verify that *content* holds the certified program and no weights beside the kept tensors.

    No kept tensor can be missing that the outputs depend on, because the certified graph hash covers its
    content. Raises `CertificateError` otherwise.
    """
    loaded = torch.export.load(io.BytesIO(content))
    root = program_root(loaded).sha256
    if root != proof.roots.any_batch:
        raise CertificateError(f"{PROGRAM}: its graph hash {root[:16]} is not the certified one")
    kept = {entry.name: entry for entry in proof.kept}
    constants = loaded.graph_signature.lifted_tensor_constants  # created in `forward`, covered by the root
    loaded_bytes = 0
    for full_name, tensor in {**loaded.state_dict, **loaded.constants}.items():
        name = full_name.removeprefix(NETWORK_PREFIX)
        tensor_bytes = tensor.numel() * tensor.element_size()
        loaded_bytes += tensor_bytes
        if tensor.untyped_storage().nbytes() != tensor_bytes:
            raise CertificateError(f"{PROGRAM}: the storage of {name} is larger than the tensor")
        if name.startswith(NORMALIZE_PREFIX) or full_name in constants:
            continue
        if name not in kept:
            raise CertificateError(f"{PROGRAM}: contains {name}, which was removed")
        if tensor_hash(tensor) != kept[name].sha256:
            raise CertificateError(f"{PROGRAM}: {name} differs from the tensor that was kept")
    entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
    written_bytes = sum(entry.file_size for entry in entries if _WEIGHTS in entry.filename)
    extra_bytes = written_bytes - loaded_bytes  # negative if two names share one written tensor
    if extra_bytes > 0:
        raise CertificateError(f"{PROGRAM}: holds {extra_bytes} bytes of weights that belong to no tensor")
