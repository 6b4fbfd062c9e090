"""The certified network as a file of torch's own, `network.pt2`, for those who go on in torch.

torch.export keeps, of the network that it was given, every weight that has a name, and of every operation the
source line that made it. So what ships is the lean program, forgotten where it came from and what it was
traced with, and it is proved on the bytes: loaded anew it has the certified Merkle root, exactly the kept
tensors, each alone in its storage, and the bundle's logits. The same program gives the same bytes.
"""

import io
import zipfile
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram

from sopdeploy.errors import CertificateError, ParityError
from sopdeploy_export.parity.compare import distance
from sopdeploy_export.parity.reference import Reference, network_outputs
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.proof.certificate import PREFIX, Certificate
from sopdeploy_export.proof.graph_hash import program_root, tensor_hash
from sopdeploy_export.proof.tensor_inventory import TensorEntry

FILE = "network.pt2"
ORIGINS = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")  # of these a path may be read
OWN = "normalise."  # what the wrapper that was captured adds to the network
BATCH = 8
WEIGHTS = "/data/weights/weight_"


def serialize_program(program: ExportedProgram, certificate: Certificate) -> bytes:
    """Return the bytes of *program*, the lean one that *certificate* speaks of; its origins are forgotten.

    Raises `CertificateError` where the bytes hold another program or other tensors than were certified.
    """
    forget_origins(program)
    program.example_inputs = None  # else they are in the file, pickled
    memory = io.BytesIO()
    torch.export.save(program, memory)
    content = memory.getvalue()
    prove(content, certificate)
    return content


def forget_origins(program: ExportedProgram) -> None:
    """Take off each operation of *program* what says which lines of which files made it."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for key in ORIGINS:
                    node.meta.pop(key, None)


def load(content: bytes) -> ExportedProgram:
    """Return the program in *content*."""
    return torch.export.load(io.BytesIO(content))


def prove(content: bytes, certificate: Certificate) -> None:
    """Refuse *content* unless it is the certified program with the kept tensors and no byte of another."""
    loaded = load(content)
    root = program_root(loaded).sha256
    if root != certificate.roots.any_batch:
        raise CertificateError(f"{FILE}: its program has the root {root[:16]}, not the certified one")
    kept = {entry.name: entry for entry in certificate.kept}
    stored = 0
    for name, tensor in {**loaded.state_dict, **loaded.constants}.items():
        own = name.removeprefix(PREFIX)
        stored += tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            raise CertificateError(f"{FILE}: {own} lies in a storage that holds more than it")
        if not own.startswith(OWN):
            refuse_another_tensor(own, tensor, kept)
    weights = {item.filename: item for item in zipfile.ZipFile(io.BytesIO(content)).infolist()}
    written = sum(item.file_size for name, item in weights.items() if WEIGHTS in name)
    if written > stored:
        raise CertificateError(f"{FILE}: holds {written - stored} bytes of weights that no tensor names")


def refuse_another_tensor(name: str, tensor: torch.Tensor, kept: Mapping[str, TensorEntry]) -> None:
    """Refuse the *tensor* called *name* where it was removed, or differs from the one that was *kept*."""
    if name not in kept:
        raise CertificateError(f"{FILE}: holds {name}, which was not kept")
    if tensor_hash(tensor) != kept[name].sha256:
        raise CertificateError(f"{FILE}: {name} is not the tensor that was kept")


def check_outputs(
    content: bytes, expected: Reference, parity: ParityReport, images: NDArray[np.uint8], largest: int
) -> None:
    """Raise `ParityError` where the program in *content* gives other outputs than the bundle may.

    *images* are the uint8 probes (P, H, W, 3), computed in batches of at most *largest*; the tolerance is the
    bundle's, from its noise floor.
    """
    counted = parity.compared_images
    found = network_outputs(
        load(content).module(), tuple(expected.outputs), images[counted], min(BATCH, largest)
    )
    for name, values in found.items():
        exact, tolerance = expected.outputs[name][counted], parity.outputs[name].tolerance
        drift = distance(name, values, exact, np.ones(len(exact), dtype=bool))
        if drift > tolerance:
            raise ParityError(f"{FILE}: drifts by {drift:.3g} in {name}; {tolerance:.3g} is allowed")
