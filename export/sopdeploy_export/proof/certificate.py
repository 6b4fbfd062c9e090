"""The certificate: proof that what is left after detaching is the plain network.

Four statements, each checked and each fatal where it does not hold:
  accounting   every tensor of the trained network is removed or kept, none is both, and the kept ones have
               the same sha256 before and after;
  graphs       the graph of the trained network's answer, of the detached network and of a plain network
               built anew from the config with the same weights have one Merkle root, for any batch size
               and for a batch of one;
  numbers      all three give bitwise equal logits on probe images, alone and in batches;
  lowering     their ONNX graphs have one root too (checked by the pipeline with `onnx_root`).

A numeric check alone cannot see `y + 0 * branch(f)`; the graphs can, and name the weights still reached.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export.graph.torch_export import Captured, Deployed, capture
from sopdeploy_export.proof.graph_hash import ProgramRoot, program_root
from sopdeploy_export.proof.preconditions import refuse_hooks, refuse_train_mode, standard_layout
from sopdeploy_export.proof.tensor_inventory import TensorEntry, build_inventory, tensors

ALONE, TOGETHER = 4, 16  # probes compared one by one, and the largest batch they are compared in
PREFIX = "network."  # what the captured wrapper puts before the network's own names


class Roots(StrictModel):
    """The one Merkle root of three networks' graphs, and how many operations it covers.

    `onnx` is that of their lowered graphs; it is empty until `with_onnx_root` has compared those.
    """

    any_batch: str
    batch_of_one: str
    operations: int
    onnx: str = ""


class Certificate(StrictModel):
    """What was proved. It exists only where every statement held."""

    model: str
    detached: tuple[str, ...]
    removed: tuple[TensorEntry, ...]
    kept: tuple[TensorEntry, ...]
    roots: Roots
    compared: tuple[str, ...] = ("trained", "detached", "plain")
    batches: tuple[int, ...]
    images: int
    largest_difference: float = 0.0

    @property
    def bytes_removed(self) -> int:
        """Return how many bytes of tensors left."""
        return sum(entry.bytes for entry in self.removed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """The certificate, and the graphs it speaks of: `lean` is the one to lower."""

    certificate: Certificate
    trained: Captured
    lean: Captured
    plain: Captured


def certify(
    trained: Classifier,
    lean: Backbone,
    preprocess: Preprocess,
    probes: Tensor,
    *,
    model: str = "network",
    batch: BatchRange | None = None,
) -> Proof:
    """Prove that *lean*, detached from *trained*, is the plain network with the trained weights.

    *probes* are uint8 images (P, crop, crop, 3). Raises `CertificateError` saying which statement does not
    hold and where; nothing is changed.
    """
    batch = batch or BatchRange()
    for role, network in (("trained", trained), ("detached", lean)):
        refuse_train_mode(network, role)
        refuse_hooks(network, role)
    whole = lean is trained  # nothing was detached
    trained = standard_layout(trained)
    lean = trained if whole else standard_layout(lean)
    removed, kept = build_inventory(trained, lean)
    networks: dict[str, Backbone] = {
        "plain": build_plain_network(trained, lean),
        "trained": trained,
        "detached": lean,
    }
    captured, roots = same_graphs(networks, preprocess, batch, {entry.name for entry in removed})
    batches = assert_equal_outputs(
        {name: Deployed(net, preprocess) for name, net in networks.items()}, probes
    )
    certificate = Certificate(
        model=model,
        detached=trained.training_only,
        removed=removed,
        kept=kept,
        roots=roots,
        batches=batches,
        images=len(probes),
    )
    return Proof(
        certificate=certificate,
        trained=captured["trained"],
        lean=captured["detached"],
        plain=captured["plain"],
    )


def build_plain_network(trained: Classifier, lean: nn.Module) -> Backbone:
    """Return a plain network, built anew from the config, that holds the weights of *lean*."""
    plain = trained.inference_model()
    source, target = tensors(lean), tensors(plain)
    missing, unknown = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    if missing:
        raise CertificateError(f"the plain network needs {missing[0]}, which the detached one lacks")
    if unknown:
        raise CertificateError(f"the detached network still has {unknown[0]}, which the plain one lacks")
    with torch.no_grad():
        for name, tensor in target.items():
            if source[name].shape != tensor.shape or source[name].dtype != tensor.dtype:
                raise CertificateError(f"{name} has another shape or type than in the plain network")
            tensor.copy_(source[name])
    return plain.eval()


def same_graphs(
    networks: dict[str, Backbone], preprocess: Preprocess, batch: BatchRange, removed: set[str]
) -> tuple[dict[str, Captured], Roots]:
    """Return the graphs of *networks*, `plain` first, and the roots they share.

    Raises naming the training-only weights still reached, or the first place where a graph differs.
    """
    captured: dict[str, Captured] = {}
    plain: dict[str, ProgramRoot] = {}
    for role, network in networks.items():
        if role == "detached" and network is networks["trained"]:
            captured[role] = captured["trained"]
            continue
        try:
            graphs = captured[role] = capture(network, preprocess, batch)
        except LoweringError as problem:
            raise CertificateError(f"the {role} network {problem}") from problem
        found = {
            "any batch size": program_root(graphs.any_batch),
            "a batch of one": program_root(graphs.batch_of_one),
        }
        plain = plain or found
        for what, root in found.items():
            refuse_reachable(root, removed, what)
            if root.sha256 != plain[what].sha256:
                where = first_difference(root, plain[what])
                raise CertificateError(f"the {role} network is not the plain one, for {what}: {where}")
    roots = Roots(
        any_batch=plain["any batch size"].sha256,
        batch_of_one=plain["a batch of one"].sha256,
        operations=len(plain["any batch size"].nodes),
    )
    return captured, roots


def with_onnx_root(certificate: Certificate, roots: dict[str, str]) -> Certificate:
    """Return *certificate* with the root that all lowered graphs share; raise where one has another."""
    for role, root in roots.items():
        if root != roots["plain"]:
            raise CertificateError(f"the lowered graph of the {role} network is not the plain one's")
    return certificate.model_copy(
        update={"roots": certificate.roots.model_copy(update={"onnx": roots["plain"]})}
    )


def refuse_reachable(root: ProgramRoot, removed: set[str], what: str) -> None:
    """Refuse an answer that depends on weights that only training should need."""
    reached = sorted(name for name in (s.removeprefix(PREFIX) for s in root.state) if name in removed)
    if reached:
        more = f" and {len(reached) - 3} more" if len(reached) > 3 else ""
        raise CertificateError(
            f"the answer still depends on training-only weights, for {what}: {', '.join(reached[:3])}{more}; "
            "a branch leaks into the main output"
        )


def first_difference(found: ProgramRoot, plain: ProgramRoot) -> str:
    """Return the first operation that only one of two graphs has, in words."""
    extra = [place for sha, place in found.nodes.items() if sha not in plain.nodes]
    lacking = [place for sha, place in plain.nodes.items() if sha not in found.nodes]
    if extra:
        return f"it computes {extra[0]}" + (f", the plain one {lacking[0]}" if lacking else "")
    if lacking:
        return f"it leaves out {lacking[0]}"
    return "its inputs or outputs differ"


def assert_equal_outputs(networks: dict[str, nn.Module], probes: Tensor) -> tuple[int, ...]:
    """Refuse outputs that are not bitwise those of the plain network; return the batch sizes compared."""
    alone = [probes[i : i + 1] for i in range(min(ALONE, len(probes)))]
    together = [probes[i : i + TOGETHER] for i in range(0, len(probes), TOGETHER)]
    for images in (*alone, *together):
        with torch.no_grad():
            answers = {role: network(images) for role, network in networks.items()}
        for role in ("trained", "detached"):
            for found, plain in zip(answers[role], answers["plain"], strict=True):
                if not torch.equal(bits(found), bits(plain)):
                    difference = (found - plain).abs().max().item()
                    raise CertificateError(
                        f"the {role} network gives other logits than the plain one at batch {len(images)}: "
                        f"largest difference {difference:.3g}"
                    )
    return (1, len(together[0]))


def bits(values: Tensor) -> Tensor:
    """Return the bytes of *values*, so that -0 is not 0 and NaN is itself."""
    return values.contiguous().view(torch.uint8)
