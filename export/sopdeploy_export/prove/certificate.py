"""The certificate: proof that the exported graph is the plain network, and measurements of the rest.

`STATEMENTS` lists what `pipeline.export_subject` checks, in this order. Statements about graphs
are proved; those about runs are measured. An export stops at the first statement that does not
hold; `Certificate` is created when all of them do. `make docs` lists them in docs/proof.md.

A comparison of numbers alone does not detect `y + 0 * branch(f)`. The comparison of graphs
does, and it names the weights that the output still depends on.

A network of the user may have no plain network or no training-only parts; `Certificate.proof`
says which networks were compared. Without a plain network, the proof cannot detect changes that
both compared networks share: frozen buffers, constants and patched methods.
"""

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.manifest import (
    PROOFS,
    OptionalPixels,
    OptionalScaling,
    Precision,
    ProofKind,
)
from sopdeploy.bundle.statements import Evidence, Statements
from sopdeploy.errors import CertificateError
from sopdeploy_export.progress import step
from sopdeploy_export.prove import file, graphs, images, pixels, plain_run, removed
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.removed import TensorEntry

EXPLAINED = "docs/proof.md"  # the page that explains the statements
# By title: the module of this folder with the sentence `STATEMENT`.
STATEMENTS = {
    "Pixels": pixels,
    "Removed": removed,
    "Graph": graphs,
    "Plain run": plain_run,
    "Images": images,
    "File": file,
}
# What a terminal shows while a statement is checked
STEPS = {
    "Pixels": "comparing the pixels of the training and of the server",
    "Removed": "proving that no output depends on the removed parts",
    "Graph": "proving that the graphs are equal",
    "Plain run": "comparing the network's code with its graph",
    "Images": "checking that the images of a batch do not affect each other",
    "File": "comparing model.onnx with the network",
}


class Roots(StrictModel):
    """Merkle roots of the program and of the ONNX graphs.

    `any_batch` is the root of the program for any batch size, which has `num_operations`.
    `onnx` is that of the graph in float32, and `shipped` that of `model.onnx`: the same in
    float32, another one in other precisions.
    """

    any_batch: str
    num_operations: int
    onnx: str
    shipped: str


class Certificate(StrictModel):
    """What was proved, and of which graph.

    `compared` lists the networks, and `proof` names the combination:

    - `three-way`: trained = detached = plain,
    - `trained-detached`: no plain network was given,
    - `trained-plain`: there was nothing to detach,
    - `trained-only`: no plain network was given, and there was nothing to detach,
    - with `rebuilt`: the builder of the trained network built the other one.

    The trained network is the one of the checkpoint. If there is a `temperature_scaling`, its
    classifier was divided by the temperature before everything else. The detached network is the
    trained one without its removed parts. Its graph is exported.

    Each tensor of the trained network is in `removed`, if the user or the catalog declared it as
    training-only; in `kept`, if it was not declared and the outputs depend on it; or else in
    `unreached`. `batches` are the batch sizes of the plain runs, and `num_images` is the number
    of images on which the file was compared. `mixes_images` names the outputs that change with
    the other images of the batch; before version 0.3.0, operators.

    `pixels` compares the server's pixels with those of the training; None if its transform was not given.

    `statements` says of each statement whether it was `proved` or `measured`.
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
    mixes_images: tuple[str, ...]
    precision: Precision
    statements: Statements
    temperature_scaling: OptionalScaling = None
    pixels: OptionalPixels = None

    @property
    def bytes_removed(self) -> int:
        """Total size of the removed tensors in bytes."""
        return sum(entry.bytes for entry in self.removed)

    def describe_compared(self) -> str:
        """Name the compared networks, and what was done to the trained one before: "trained = plain"."""
        networks = " = ".join(self.compared)
        if self.temperature_scaling is None:
            return networks
        factor = f"{self.temperature_scaling.temperature:.4g}"
        return networks.replace("trained", f"trained (classifier divided by {factor})", 1)


def kind_of_proof(plain: Compared | None, parts: tuple[str, ...]) -> ProofKind:
    """Return the kind of proof: by whether *parts* are removed, and whether there is a *plain* network."""
    roles = {"trained"}
    if parts:
        roles.add("detached")
    if plain is not None:
        roles.add(plain.role)
    return next(kind for kind, compared in PROOFS.items() if set(compared) == roles)


def evidence_of(statement: str) -> Evidence:
    """Return whether *statement*, a key of `STATEMENTS`, is proved or measured."""
    return "proved" if STATEMENTS[statement].IS_PROVED else "measured"


class Checks:
    """The statements that an export has begun to check."""

    def __init__(self) -> None:
        self._begun: list[str] = []

    def begin(self, statement: str) -> None:
        """Describe the step that checks *statement*, a key of `STATEMENTS`."""
        self._begun.append(statement)
        step(STEPS[statement])

    def evidence(self) -> dict[str, Evidence]:
        """Return whether each statement was proved or measured.

        Raises `CertificateError` unless all of them were checked, in their order.
        """
        if self._begun != [*STATEMENTS]:
            raise CertificateError(
                f"the export checked {', '.join(self._begun) or 'nothing'} instead of "
                f"{', '.join(STATEMENTS)}; report this as a bug"
            )
        return {statement: evidence_of(statement) for statement in STATEMENTS}
