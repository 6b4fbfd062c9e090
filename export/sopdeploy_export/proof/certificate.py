"""The certificate: proof that the detached network is the plain network.

`STATEMENTS` lists what is checked. The export stops at the first statement that does not hold; `Certificate`
is created when all of them do. `certify` checks those about networks and returns a `NetworkProof`,
`pipeline.check_onnx` checks those about the ONNX graph.

A comparison of numbers alone does not detect `y + 0 * branch(f)`. The comparison of graphs does, and it
names the weights that the output still depends on.

A network of the user may have no plain network or no training-only parts; `Certificate.proof` says which
networks were compared. Without a plain network, the proof cannot detect changes that both compared networks
share: frozen buffers, constants and patched methods.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sopdeploy.bundle.manifest import PROOFS, BatchRange, Precision, ProofKind
from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError, LoweringError, shorten
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier, is_in
from sopdeploy_export.graph.capture import Captured, capture
from sopdeploy_export.graph.deployed import NETWORK_PREFIX, Deployed
from sopdeploy_export.program_hashes import (
    are_equal,
    compute_roots,
    describe_difference,
    find_size_difference,
    hashing_once,
    tensor_hash,
)
from sopdeploy_export.proof.networks import (
    Detachment,
    contiguous,
    fit_prefix,
    load_plain_network,
    prepare_networks,
)
from sopdeploy_export.proof.repetition import check_repetition
from sopdeploy_export.proof.tensors import TensorEntry, build_inventory, find_usage
from sopdeploy_export.state import tensors
from sopdeploy_export.stubs import removed_modules

STATEMENTS = {
    "Tensors": "Each tensor is removed, needed or neither; all but the removed ones have the same sha256 "
    "before and after.",
    "Graphs": "The trained network's output, the detached network and a plain network built "
    "independently have one Merkle root.",
    "Batch sizes": "The graph for any batch size, with one image, computes what the graph for one "
    "image computes.",
    "Outputs": "These networks return bitwise equal outputs for probe images, alone and in batches.",
    "Repetition": "The detached network returns bitwise equal outputs after 300 calls on another image, "
    "and nothing that it holds changes.",
    "ONNX": "The ONNX graphs of these networks have one Merkle root.",
    "Images": "No output depends on other images of the batch. Otherwise the export names the operators.",
}
_SINGLE_PROBES = 4  # compared one by one
MAX_BATCH = 16  # largest batch of probes


class Roots(StrictModel):
    """The Merkle roots of the programs that the networks share; `any_batch` covers `num_operations`."""

    any_batch: str
    batch_of_one: str
    num_operations: int


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


class GraphProof(NamedTuple):
    """The root of the networks' ONNX graphs in float32, and the operators through which they mix images."""

    root: str
    mixes_images: tuple[str, ...]


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
    """Prove that *detached* is the plain network with the weights of *trained*.

    *probes* are uint8 images (P, crop, crop, 3). A network of the catalog needs no *detachment*, because it
    declares its own. Returns the proof and the captured networks: `trained`, `detached`, and `plain` if
    it exists. Raises `CertificateError` with the violated statement; neither network is changed.
    """
    if detachment is None:
        detachment = Detachment.of(trained) if isinstance(trained, Classifier) else Detachment()
    is_detached = detached is not trained
    with hashing_once():  # at the end, `_assert_unchanged` computes all hashes again
        compared = prepare_networks(trained, detached, detachment.training_only)
        remaining = compared["detached" if is_detached else "trained"]
        removed, kept = build_inventory(trained, detached, detachment.training_only)
        reference, rename = detachment.reference, detachment.rename
        if detachment.plain is not None:
            built = detachment.plain()
            rename = fit_prefix(built, remaining, rename)
            load_plain_network(built, remaining, rename)
            compared = {reference: contiguous(built), **compared}  # the first one is the reference
        captured = _capture_networks(compared, preprocess, batch or BatchRange(), detachment.captured)
        roots, reached = _assert_equal_graphs(captured, trained, detachment.training_only)
    used, _ = find_usage(remaining, reached)
    deployed = {role: Deployed(network, preprocess) for role, network in compared.items()}
    sizes = assert_equal_outputs(deployed, probes)
    check_repetition(remaining, preprocess, probes)
    plain = compared.pop(reference, None)
    # Both the given networks and their contiguous copies, if any: `forward` may have written to either.
    for network in {id(network): network for network in (trained, detached, *compared.values())}.values():
        _assert_unchanged(network, kept)
    if plain is not None:
        _assert_unchanged_plain(plain, tensors(remaining), kept, rename)
    roles = [role for role in ("trained", "detached", reference) if role in captured]
    kind = next(kind for kind, compared_by in PROOFS.items() if list(compared_by) == roles)
    proof = NetworkProof(
        model=model,
        proof=kind,
        detached=detachment.training_only if is_detached else (),
        removed=removed,
        kept=tuple(entry for entry in kept if entry.name in used),
        unreached=tuple(entry for entry in kept if entry.name not in used),
        roots=roots,
        compared=PROOFS[kind],
        batches=sizes,
        num_images=len(probes),
    )
    return proof, {"detached": captured["trained"], **captured}


def _capture_networks(
    networks: dict[str, nn.Module],
    preprocess: Preprocess,
    batch: BatchRange,
    captured_trained: Captured | None,
) -> dict[str, Captured]:
    """Capture *networks*; those with the same operations and weights share programs.

    *captured_trained* are the programs of the trained network if it was captured before. The network that
    ships comes first, because its programs name what the exported file holds.
    """
    captured = {} if captured_trained is None else {"trained": captured_trained}
    for role in ("detached", "trained", *networks):
        if role in networks and role not in captured:
            try:
                captured[role] = capture(networks[role], preprocess, batch, tuple(captured.values()))
            except LoweringError as error:
                raise CertificateError(f"{role} network: {error}") from error
    return {role: captured[role] for role in networks}


def _assert_equal_graphs(
    captured: Mapping[str, Captured], trained: nn.Module, training_only: tuple[str, ...]
) -> tuple[Roots, Set[str]]:
    """Check that all networks have the Merkle roots of the first one, for any batch size and for one image.

    Returns the roots, and the names of the tensors that the outputs depend on. Raises `CertificateError` with
    the removed weights or modules that an output depends on, or with the first operation that differs from
    the first network.
    """
    first_role, first = next(iter(captured.items()))
    expected = compute_roots(first.any_batch, first.batch_of_one)
    if (difference := find_size_difference(first.any_batch, first.batch_of_one)) is not None:
        raise CertificateError(
            f"the network for larger batches is not the network for a batch of one: {difference}; its code "
            "must not depend on the batch size"
        )
    removed = removed_modules(trained, training_only).keys()
    reached: set[str] = set()
    for role, programs in captured.items():
        roots = expected
        if programs is not first:
            roots = compute_roots(programs.any_batch, programs.batch_of_one)
        for size, root in roots.items():
            weights = {name.removeprefix(NETWORK_PREFIX) for name in root.state}
            if leaking := sorted(name for name in weights if is_in(name, *training_only)):
                raise CertificateError(
                    f"the output still depends on training-only weights, for {size}: "
                    f"{shorten(leaking)}; a branch affects the main output"
                )
            if role == "trained" and (leaking := sorted(root.modules & removed)):
                raise CertificateError(
                    f"the output depends on operations of {shorten(leaking)}, for {size}: a removed part "
                    "changes a value that is needed; keep it"
                )
            if root.sha256 != expected[size].sha256:
                difference = describe_difference(root, expected[size], first_role)
                problem = f"the {role} network is not the {first_role} one, for {size}"
                raise CertificateError(f"{problem}: {difference}")
            if role in ("trained", "detached"):
                reached |= weights
    roots_of_all = Roots(
        any_batch=expected["any batch size"].sha256,
        batch_of_one=expected["a batch of one"].sha256,
        num_operations=len(expected["any batch size"].nodes),
    )
    return roots_of_all, reached


def assert_equal_outputs(networks: Mapping[str, nn.Module], probes: Tensor) -> tuple[int, ...]:
    """Raise `CertificateError` unless all outputs for *probes* are bitwise equal; return the batch sizes."""
    single = [probes[i : i + 1] for i in range(min(_SINGLE_PROBES, len(probes)))]
    batches = [probes[i : i + MAX_BATCH] for i in range(0, len(probes), MAX_BATCH)]
    reference = next(iter(networks))
    for images in (*single, *batches):
        with torch.no_grad():
            outputs = {role: network(images) for role, network in networks.items()}
        for role in outputs:
            for values, expected in zip(outputs[role], outputs[reference], strict=True):
                if not are_equal(values, expected):
                    difference = (values - expected).abs().max().item()
                    raise CertificateError(
                        f"the {role} network gives other logits than the {reference} one at batch "
                        f"{len(images)}: largest difference {difference:.3g}"
                    )
    return (1, len(batches[0]))  # the last batch may be smaller


def _assert_unchanged(network: nn.Module, kept: Sequence[TensorEntry]) -> None:
    """Raise `CertificateError` if a kept tensor changed, because code outside of the graph wrote to it."""
    current = tensors(network)
    for entry in kept:
        if entry.name not in current or tensor_hash(current[entry.name]) != entry.sha256:
            raise CertificateError(f"{entry.name} changed during the proof; forward must not write to it")


def _assert_unchanged_plain(
    plain: nn.Module,
    unchanged: Mapping[str, Tensor],
    kept: Sequence[TensorEntry],
    rename: Callable[[str], str],
) -> None:
    """Raise `CertificateError` if a tensor of *plain* differs from the *unchanged* one that it copies."""
    current = tensors(plain)
    for entry in kept:
        name = rename(entry.name)
        if name not in current or not are_equal(current[name], unchanged[entry.name]):
            raise CertificateError(f"{name} of the plain network changed during the proof")
