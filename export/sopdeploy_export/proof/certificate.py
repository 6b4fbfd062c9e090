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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sopdeploy.bundle.manifest import PROOFS, BatchRange, Precision, ProofKind
from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError, LoweringError, shorten
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT, images_format
from sopdeploy.models.base import Classifier, is_in
from sopdeploy_export.graph import EXPORT_EMBEDDING, NETWORK_PREFIX, Captured, Deployed, capture
from sopdeploy_export.program_hashes import (
    ProgramRoot,
    hashing_once,
    program_root,
    stored_hash,
    tensor_hash,
    value_root,
)
from sopdeploy_export.proof.networks import Detachment, check_network_state, check_torch_state, contiguous
from sopdeploy_export.proof.repetition import check_repetition
from sopdeploy_export.state import tensors

STATEMENTS = {
    "Tensors": "Each tensor is removed or kept; the kept ones have the same sha256 before and after.",
    "Graphs": "The trained network's output, the detached network and a plain network built "
    "independently have one Merkle root.",
    "Batch sizes": "The graph for any batch size, with one image, computes what the graph for one "
    "image computes.",
    "Outputs": "These networks return bitwise equal outputs for probe images, alone and in batches.",
    "Repetition": "The detached network returns bitwise equal outputs after 300 calls on another image.",
    "ONNX": "The ONNX graphs of these networks have one Merkle root.",
    "Images": "No output depends on other images of the batch. Otherwise the export names the operators.",
}
_SINGLE_PROBES = 4  # compared one by one
MAX_BATCH = 16  # largest batch of probes


class TensorEntry(StrictModel):
    """One parameter or buffer, with the sha256 of its content."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


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
    `trained-plain` (nothing to detach) or `trained-only`; `compared` lists the networks that were compared.
    """

    model: str
    proof: ProofKind = "three-way"
    detached: tuple[str, ...]
    removed: tuple[TensorEntry, ...]
    kept: tuple[TensorEntry, ...]
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

    @classmethod
    def of(
        cls, proof: NetworkProof, onnx: str, shipped: str, mixes_images: tuple[str, ...], precision: Precision
    ) -> "Certificate":
        """Complete *proof* with the roots *onnx* in float32 and *shipped* in *precision*."""
        roots = FileRoots(**dict(proof.roots), onnx=onnx, shipped=shipped)
        fields = {**dict(proof), "roots": roots}
        return cls(**fields, mixes_images=mixes_images, precision=precision)


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
    check_torch_state()
    check_network_state(trained, "trained", detachment.training_only)
    check_network_state(detached, "detached")
    nothing_detached = detached is trained
    with hashing_once():  # at the end, `_assert_unchanged` computes all hashes again
        removed, kept = build_inventory(trained, detached, detachment.training_only)
        compared = {"trained": contiguous(trained)}
        compared["detached"] = compared["trained"] if nothing_detached else contiguous(detached)
        if detachment.plain is not None:
            plain = build_plain_network(detachment.plain, compared["detached"], detachment.rename)
            compared = {"plain": contiguous(plain), **compared}  # the first one is the reference
        captured, roots = _assert_equal_graphs(
            compared,
            preprocess,
            batch or BatchRange(),
            {entry.name for entry in removed},
            detachment.captured,
        )
    deployed = {role: Deployed(network, preprocess) for role, network in compared.items()}
    sizes = assert_equal_outputs(deployed, probes)
    check_repetition(compared["detached"], preprocess, probes)
    # Both the given networks and their copies by `contiguous`, if any: `forward` may have written to either.
    checked = (trained, detached, compared["trained"], compared["detached"])
    for network in {id(network): network for network in checked}.values():  # each network once
        _assert_unchanged(network, kept, rename=str)
    if "plain" in compared:
        _assert_unchanged(compared["plain"], kept, detachment.rename)
        kind: ProofKind = "trained-plain" if nothing_detached else "three-way"
    else:
        kind = "trained-only" if nothing_detached else "trained-detached"
    proof = NetworkProof(
        model=model,
        proof=kind,
        detached=() if nothing_detached else detachment.training_only,
        removed=removed,
        kept=kept,
        roots=roots,
        compared=PROOFS[kind],
        batches=sizes,
        num_images=len(probes),
    )
    return proof, captured


def build_plain_network(
    build: Callable[[], nn.Module], detached: nn.Module, rename: Callable[[str], str] = str
) -> nn.Module:
    """Build a plain network with *build* and copy the weights of *detached* into it.

    *rename* maps the name of a tensor in *detached* to its name in the plain network. Buffers that
    checkpoints do not store follow from the config, so they are compared instead of copied. Raises
    `CertificateError` if such a buffer differs, or if the networks have tensors of other names or shapes.
    """
    plain = build()
    embedding_layer = vars(detached).get(EXPORT_EMBEDDING)
    if embedding_layer is not None:  # *rename* takes names of tensors, such as its weight
        vars(plain)[EXPORT_EMBEDDING] = rename(f"{embedding_layer}.weight").removesuffix(".weight")
    vars(plain)[IMAGES_FORMAT] = images_format(detached)
    detached_tensors, plain_tensors = tensors(detached), tensors(plain)
    renamed = {rename(name): tensor for name, tensor in detached_tensors.items()}
    if len(renamed) != len(detached_tensors):
        raise CertificateError("rename gives two tensors of the trained network the same name")
    if missing := sorted(plain_tensors.keys() - renamed.keys()):
        raise CertificateError(f"the plain network needs {missing[0]}, which the detached one lacks")
    if extra := sorted(renamed.keys() - plain_tensors.keys()):
        raise CertificateError(f"the detached network still has {extra[0]}, which the plain one lacks")
    stored_names = plain.state_dict().keys()  # without the buffers that checkpoints do not store
    with torch.no_grad():
        for name, tensor in plain_tensors.items():
            source = renamed[name]
            if source.shape != tensor.shape or source.dtype != tensor.dtype:
                raise CertificateError(f"{name} has a different shape or dtype in the plain network")
            if name in stored_names:
                tensor.copy_(source)
            elif tensor_hash(tensor) != tensor_hash(source):
                raise CertificateError(
                    f"{name} differs from the plain network's; checkpoints do not store this buffer, "
                    "so its values must follow from the config"
                )
    plain.eval()
    return plain


def _assert_equal_graphs(
    networks: dict[str, nn.Module],
    preprocess: Preprocess,
    batch: BatchRange,
    removed: set[str],
    captured_trained: Captured | None,
) -> tuple[dict[str, Captured], Roots]:
    """Capture *networks* and check that all have the same Merkle roots.

    *captured_trained* are the programs of the trained network if it was captured before. Raises
    `CertificateError` with the removed weights that an output depends on, or with the first operation that
    differs from the first network.
    """
    captured = _capture_networks(networks, preprocess, batch, captured_trained)
    first_role, first_programs = next(iter(captured.items()))
    _assert_equal_sizes(first_programs)
    expected = _compute_roots(first_programs)
    for role, programs in captured.items():
        roots = expected if programs is first_programs else _compute_roots(programs)
        for size, root in roots.items():
            weights = {name.removeprefix(NETWORK_PREFIX) for name in root.state}
            if reached := sorted(weights & removed):
                raise CertificateError(
                    f"the output still depends on training-only weights, for {size}: "
                    f"{shorten(reached)}; a branch affects the main output"
                )
            if root.sha256 != expected[size].sha256:
                difference = _first_difference(root, expected[size], first_role)
                problem = f"the {role} network is not the {first_role} one, for {size}"
                raise CertificateError(f"{problem}: {difference}")
    shared = Roots(
        any_batch=expected["any batch size"].sha256,
        batch_of_one=expected["a batch of one"].sha256,
        num_operations=len(expected["any batch size"].nodes),
    )
    return captured, shared


def _compute_roots(programs: Captured) -> dict[str, ProgramRoot]:
    return {
        "any batch size": program_root(programs.any_batch),
        "a batch of one": program_root(programs.batch_of_one),
    }


def _capture_networks(
    networks: dict[str, nn.Module],
    preprocess: Preprocess,
    batch: BatchRange,
    captured_trained: Captured | None,
) -> dict[str, Captured]:
    """Capture *networks*; those with the same operations and weights share programs.

    The detached one comes first, because its programs name what the exported file holds.
    """
    trained, detached = networks["trained"], networks["detached"]
    captured = {} if captured_trained is None else {id(trained): captured_trained}  # by the network's id
    first = "trained" if detached is trained else "detached"  # the name of this network in error messages
    for role in (first, *networks):
        network = networks[role]
        if id(network) in captured:
            continue
        try:
            captured[id(network)] = capture(network, preprocess, batch, tuple(captured.values()))
        except LoweringError as error:
            raise CertificateError(f"{role} network: {error}") from error
    return {role: captured[id(network)] for role, network in networks.items()}


def _assert_equal_sizes(programs: Captured) -> None:
    """Check that the exported graph, with batch size 1, equals the graph that was captured for one image.

    torch.export itself checks that all batch sizes of at least 2 have one graph.
    """
    if programs.batch_of_one is programs.any_batch:
        return
    any_size, one_image = value_root(programs.any_batch, batch=1), value_root(programs.batch_of_one)
    if any_size.sha256 != one_image.sha256:
        difference = _first_difference(any_size, one_image, "other")
        raise CertificateError(
            f"the network for larger batches is not the network for a batch of one: {difference}; its code "
            "must not depend on the batch size"
        )


def _first_difference(root: ProgramRoot, expected: ProgramRoot, reference: str) -> str:
    """Describe how *root* differs from *expected*, which is the root of the *reference* network."""
    extra = next((name for sha256, name in root.nodes.items() if sha256 not in expected.nodes), None)
    missing = next((name for sha256, name in expected.nodes.items() if sha256 not in root.nodes), None)
    if extra is None:
        return "its inputs or outputs differ" if missing is None else f"it lacks {missing}"
    if missing is None:
        return f"it computes {extra}"
    if extra == missing:  # the same operation, with another hash
        return f"{extra} has other weights, operands or arguments than in the {reference} one"
    return f"it computes {extra}, the {reference} one {missing}"


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
                if not _are_equal(values, expected):
                    difference = (values - expected).abs().max().item()
                    raise CertificateError(
                        f"the {role} network gives other logits than the {reference} one at batch "
                        f"{len(images)}: largest difference {difference:.3g}"
                    )
    return (1, len(batches[0]))  # the last batch may be smaller


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Compare type, shape and content; as bytes, because 0 equals -0 and NaN differs from itself."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    content = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*content)


def build_inventory(
    trained: nn.Module, detached: nn.Module, training_only: tuple[str, ...]
) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
    """List the removed and the kept tensors of *trained*.

    Raises `CertificateError` if a tensor of *detached* is new, is changed, is in *training_only*, or shares
    memory with a removed tensor, or if a removed tensor is not in *training_only*.
    """
    before, after = tensors(trained), tensors(detached)
    if new := sorted(after.keys() - before.keys()):
        raise CertificateError(f"the detached network has a tensor {new[0]} that was never trained")
    removed = {name: tensor for name, tensor in before.items() if name not in after}
    for name in removed:
        if not is_in(name, *training_only):
            raise CertificateError(f"{name} was removed, but is not training-only: {list(training_only)}")
    if still_held := [name for name in after if is_in(name, *training_only)]:
        raise CertificateError(f"{still_held[0]} is training-only, but the detached network still has it")
    check_removed_memory(removed, {name: before[name] for name in after})
    kept = []
    for name, tensor in after.items():
        if tensor is not before[name] and not _are_equal(tensor, before[name]):
            raise CertificateError(f"{name} changed while the network was detached")
        kept.append(_entry(name, before[name]))
    return tuple(_entry(name, tensor) for name, tensor in removed.items()), tuple(kept)


def check_removed_memory(removed: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Raise `CertificateError` if a removed and a kept tensor overlap in memory, even in two storages."""
    kept_ranges = [(name, *_addresses(tensor)) for name, tensor in kept.items()]
    for name, tensor in removed.items():
        start, end = _addresses(tensor)
        for kept_name, kept_start, kept_end in kept_ranges:
            if start < kept_end and kept_start < end:
                problem = f"shares its memory with {kept_name}, which was kept"
                raise CertificateError(f"{name} was removed but {problem}")


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of *tensor* and the address after its last; (0, 0) if it is empty."""
    if not tensor.numel():
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)  # strides are never negative
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _assert_unchanged(network: nn.Module, kept: Sequence[TensorEntry], rename: Callable[[str], str]) -> None:
    """Raise `CertificateError` if a kept tensor changed, because code outside of the graph wrote to it."""
    current = tensors(network)
    for entry in kept:
        name = rename(entry.name)
        if name not in current or tensor_hash(current[name]) != entry.sha256:
            raise CertificateError(f"{entry.name} changed during the proof; forward must not write to it")


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.numel() * tensor.element_size(),
        sha256=stored_hash(tensor),
    )
