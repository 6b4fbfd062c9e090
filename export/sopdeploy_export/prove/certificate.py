"""The certificate: proof that the detached network is the plain network.

`STATEMENTS` lists what is checked. The export stops at the first statement that does not hold;
`Certificate` is created when all of them do. `certify` checks those about networks, in this
order, and returns a `NetworkProof`; `pipeline` checks those about the ONNX graph. `make docs`
lists them in docs/concepts.md.

A comparison of numbers alone does not detect `y + 0 * branch(f)`. The comparison of graphs
does, and it names the weights that the output still depends on.

A network of the user may have no plain network or no training-only parts; `Certificate.proof`
says which networks were compared. Without a plain network, the proof cannot detect changes that
both compared networks share: frozen buffers, constants and patched methods.
"""

from collections.abc import Callable

from torch import Tensor, nn

from sopdeploy.bundle.manifest import PROOFS, Precision, ProofKind
from sopdeploy.config import StrictModel
from sopdeploy.models.base import Classifier
from sopdeploy_export.admit.state import check_torch_state
from sopdeploy_export.capture.deployed import Deployed
from sopdeploy_export.capture.program import Capture, Captures
from sopdeploy_export.program_hashes import hashing_once
from sopdeploy_export.prove import (
    file,
    graphs,
    images,
    plain_run,
    tensors,
)
from sopdeploy_export.prove.constants import check_constants
from sopdeploy_export.prove.graphs import Roots, capture_networks, prove_graphs
from sopdeploy_export.prove.networks import Compared, load_plain_network
from sopdeploy_export.prove.plain_run import LARGEST, prove_plain_run
from sopdeploy_export.prove.tensors import (
    TensorEntry,
    needed_tensors,
    prove_tensors,
    prove_values_unread,
)
from sopdeploy_export.subject import Detachment

# by title: the module beside this one with the sentence `STATEMENT`
STATEMENTS = {
    "Tensors": tensors,
    "Graphs": graphs,
    "Plain run": plain_run,
    "Images": images,
    "File": file,
}


Step = Callable[[str], None]


class FileRoots(Roots):
    """Also the root of the ONNX graphs in float32, and that of `model.onnx`, which differs if it is not."""

    onnx: str
    shipped: str


class NetworkProof(StrictModel):
    """The statements about networks that were proved.

    `proof` is `three-way` (trained = detached = plain), `trained-detached` (no plain network
    was given), `trained-plain` (nothing to detach), `trained-only`, or with `rebuilt` in place
    of `plain` if the builder of the trained network built the other one; `compared` lists the
    networks that were compared. Each tensor of the trained network is in `removed`, which the
    user or the catalog declared as training-only; in `kept`, which the outputs depend on; or in
    `unreached`, which was neither declared nor needed.
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

    `mixes_images` names the operators through which an output may depend on other images of the
    batch.
    """

    roots: FileRoots
    mixes_images: tuple[str, ...]
    precision: Precision

    @classmethod
    def of(
        cls,
        proof: NetworkProof,
        onnx: str,
        shipped: str,
        mixes_images: tuple[str, ...],
        precision: Precision,
    ) -> "Certificate":
        """Add to *proof* what was proved of the graph and of the file: roots, and images that mix."""
        roots = FileRoots(**dict(proof.roots), onnx=onnx, shipped=shipped)
        return cls(
            **{**dict(proof), "roots": roots}, mixes_images=mixes_images, precision=precision
        )


def certify(
    trained: nn.Module,
    detached: nn.Module,
    captures: Captures,
    probes: Tensor,
    *,
    model: str = "network",
    detachment: Detachment | None = None,
    on_step: Step = lambda _: None,
) -> tuple[NetworkProof, dict[str, Capture]]:
    """Prove the statements about networks: *detached* is the plain network with the weights of *trained*.

    *probes* are uint8 images (P, crop, crop, 3). A network of the catalog needs no
    *detachment*, because it declares its own. Returns the proof and the programs by network;
    the trained network stands for a detached one. Raises `CertificateError` with
    the violated statement; no network is changed.
    """
    if detachment is None:
        detachment = Detachment.of(trained) if isinstance(trained, Classifier) else Detachment()
    parts = detachment.training_only if detached is not trained else ()
    with hashing_once():  # at the end, `check_unchanged` computes all hashes again
        on_step(announce("Tensors"))
        check_torch_state()
        compared = {"trained": Compared.of("trained", trained, parts)}
        if detached is not trained:
            compared["detached"] = Compared.of("detached", detached)
        shipped = [*compared.values()][-1]
        removed, kept = prove_tensors(compared["trained"], shipped, detachment.training_only)
        # it comes first, because the others are compared with the first
        if detachment.plain is not None:
            compared = {detachment.role: load_plain_network(detachment, shipped), **compared}
        networks = {role: of_role.network for role, of_role in compared.items()}
        captures.forget_roots()
        programs = capture_networks(networks, captures, _details("Graphs", on_step))
        if not detachment.allow_constants and detachment.plain is not None:
            rebuilt = programs[detachment.role].traced
            check_constants(programs["trained"].traced, lambda: rebuilt)
        roots, reached = prove_graphs(programs, trained, detachment.training_only)
        if parts and not captures.are_unread(networks["trained"], parts):
            on_step(f"{announce('Tensors')}, random values in what is removed")
            prove_values_unread(networks["trained"], parts, captures, programs["trained"])
    on_step(announce("Plain run"))
    largest_batch = captures.batch.maximum
    deployed = Deployed(networks["trained"], captures.preprocess)
    prove_plain_run(deployed, programs["trained"].graph, probes, parts, largest_batch)
    for of_role in compared.values():
        of_role.check_unchanged({entry.name for entry in removed})
    needed = needed_tensors(shipped.network, reached)
    kind = next(kind for kind, roles in PROOFS.items() if set(roles) == networks.keys())
    proof = NetworkProof(
        model=model,
        proof=kind,
        detached=parts,
        removed=removed,
        kept=tuple(entry for entry in kept if entry.name in needed),
        unreached=tuple(entry for entry in kept if entry.name not in needed),
        roots=roots,
        compared=PROOFS[kind],
        batches=tuple(range(1, min(LARGEST, largest_batch) + 1)),
        num_images=len(probes),
    )
    return proof, {"detached": programs["trained"], **programs}


def announce(statement: str) -> str:
    """Describe the step that proves *statement*, a key of `STATEMENTS`."""
    number = [*STATEMENTS].index(statement) + 1
    return f"proving statement {number} of {len(STATEMENTS)}: {statement}"


def _details(statement: str, on_step: Step) -> Step:
    """Return a callback that announces a detail of *statement*, which takes long."""
    return lambda detail: on_step(f"{announce(statement)}, {detail}")
