"""The certificate: proof that the detached network is the plain network.

`STATEMENTS` lists what is checked. The export stops at the first statement that does not hold; `Certificate`
is created when all of them do. `certify` checks those about networks, in this order, and returns a
`NetworkProof`; `pipeline` checks those about the ONNX graph. Each statement has a file beside this one.

A comparison of numbers alone does not detect `y + 0 * branch(f)`. The comparison of graphs does, and it
names the weights that the output still depends on.

A network of the user may have no plain network or no training-only parts; `Certificate.proof` says which
networks were compared. Without a plain network, the proof cannot detect changes that both compared networks
share: frozen buffers, constants and patched methods.
"""

from torch import Tensor, nn

from sopdeploy.bundle.manifest import PROOFS, BatchRange, Precision, ProofKind
from sopdeploy.config import StrictModel
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.admit.state import check_torch_state
from sopdeploy_export.capture.deployed import Deployed
from sopdeploy_export.capture.program import Captured
from sopdeploy_export.program_hashes import hashing_once
from sopdeploy_export.prove import (
    batch_sizes,
    file,
    graphs,
    images,
    onnx_graphs,
    outputs,
    repetition,
    tensors,
)
from sopdeploy_export.prove.batch_sizes import prove_batch_sizes
from sopdeploy_export.prove.graphs import Roots, capture_networks, prove_graphs
from sopdeploy_export.prove.networks import Prepared, load_plain_network
from sopdeploy_export.prove.outputs import prove_outputs
from sopdeploy_export.prove.repetition import prove_repetition
from sopdeploy_export.prove.tensors import TensorEntry, find_usage, prove_tensors
from sopdeploy_export.subject import Detachment

STATEMENTS = {
    "Tensors": tensors.STATEMENT,
    "Graphs": graphs.STATEMENT,
    "Batch sizes": batch_sizes.STATEMENT,
    "Outputs": outputs.STATEMENT,
    "Repetition": repetition.STATEMENT,
    "ONNX": onnx_graphs.STATEMENT,
    "Images": images.STATEMENT,
    "File": file.STATEMENT,
}


class FileRoots(Roots):
    """Also the root of the ONNX graphs in float32, and that of `model.onnx`, which differs if it is not."""

    onnx: str
    shipped: str


class NetworkProof(StrictModel):
    """The statements about networks that were proved.

    `proof` is `three-way` (trained = detached = plain), `trained-detached` (no plain network was given),
    `trained-plain` (nothing to detach), `trained-only`, or with `rebuilt` in place of `plain` if the builder
    of the trained network built the other one; `compared` lists the networks that were compared. Each tensor
    of the trained network is in `removed`, which the user or the catalog declared as training-only; in
    `kept`, which the outputs depend on; or in `unreached`, which was neither declared nor needed.
    """

    model: str
    proof: ProofKind = "three-way"
    detached: tuple[str, ...]
    removed: tuple[TensorEntry, ...]
    kept: tuple[TensorEntry, ...]
    unreached: tuple[TensorEntry, ...] = ()
    roots: Roots
    compared: tuple[str, ...] = ("trained", "detached", "plain")
    batches: tuple[int, ...]
    num_images: int
    largest_difference: float = 0.0

    @property
    def bytes_removed(self) -> int:
        """Total size of the removed tensors in bytes."""
        return sum(entry.bytes for entry in self.removed)


class Certificate(NetworkProof):
    """All statements that were proved, and the graph that ships in a precision.

    `mixes_images` names the operators through which an output may depend on other images of the batch.
    """

    roots: FileRoots
    mixes_images: tuple[str, ...]
    precision: Precision


def certify(
    trained: nn.Module,
    detached: nn.Module,
    preprocess: Preprocess,
    probes: Tensor,
    *,
    model: str = "network",
    batch: BatchRange | None = None,
    detachment: Detachment | None = None,
) -> tuple[NetworkProof, dict[str, Captured]]:
    """Prove statements 1 to 5: *detached* is the plain network with the weights of *trained*.

    *probes* are uint8 images (P, crop, crop, 3). A network of the catalog needs no *detachment*, because it
    declares its own. Returns the proof and the captured networks: `trained`, `detached`, and `plain` or
    `rebuilt` if it exists. Raises `CertificateError` with the violated statement; no network is changed.
    """
    if detachment is None:
        detachment = Detachment.of(trained) if isinstance(trained, Classifier) else Detachment()
    is_detached, training_only = detached is not trained, detachment.training_only
    with hashing_once():  # at the end, `check_unchanged` computes all hashes again
        check_torch_state()
        # Without a detached network, also the training-only parts, which have no tensors, must be in order.
        prepared_trained = Prepared.of("trained", trained, training_only if is_detached else ())
        prepared = {"trained": prepared_trained}
        if is_detached:
            prepared["detached"] = Prepared.of("detached", detached)
        shipped = prepared["detached" if is_detached else "trained"]
        # 1. Tensors
        removed, kept = prove_tensors(prepared_trained, shipped, training_only)
        if detachment.plain is not None:  # it comes first, because the others are compared with the first
            prepared = {detachment.reference: load_plain_network(detachment, shipped), **prepared}
        # 2. Graphs
        networks = {role: of_role.network for role, of_role in prepared.items()}
        captured = capture_networks(networks, preprocess, batch or BatchRange(), detachment.captured)
        roots, reached = prove_graphs(captured, trained, training_only)
        # 3. Batch sizes
        prove_batch_sizes(next(iter(captured.values())))
    # 4. Outputs
    deployed = {role: Deployed(network, preprocess) for role, network in networks.items()}
    sizes = prove_outputs(deployed, probes)
    # 5. Repetition
    prove_repetition(shipped.network, preprocess, probes)
    for of_role in prepared.values():
        of_role.check_unchanged({entry.name for entry in removed})
    used, _ = find_usage(shipped.network, reached)
    kind = next(kind for kind, roles in PROOFS.items() if set(roles) == networks.keys())
    proof = NetworkProof(
        model=model,
        proof=kind,
        detached=training_only if is_detached else (),
        removed=removed,
        kept=tuple(entry for entry in kept if entry.name in used),
        unreached=tuple(entry for entry in kept if entry.name not in used),
        roots=roots,
        compared=PROOFS[kind],
        batches=sizes,
        num_images=len(probes),
    )
    # Without a detached network, the trained one stands for it.
    return proof, {"detached": captured["trained"], **captured}
