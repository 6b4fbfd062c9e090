"""The compared networks: what is known of each is made once, and handed on."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import CertificateError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT, images_format
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.buffers import create_buffers
from sopdeploy_export.capture.deployed import EXPORT_EMBEDDING, Deployed
from sopdeploy_export.capture.program import NETWORK_PREFIX, Trace, functionalize, trace
from sopdeploy_export.network import tensors, unstored_buffers
from sopdeploy_export.program_hashes import (
    ProgramRoot,
    TensorHashes,
    are_equal,
    fingerprint,
    program_root,
)
from sopdeploy_export.subject import Detachment


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A network of the comparison.

    Attributes:
        role: `trained`, `plain` or `rebuilt`.
        network: It, in eval mode on the CPU.
        deployed: The network with the normalization of its images.
        tensors: Its tensors by name.
        hashes: The sha256 of each, computed before the capture.
        trace: What torch.export made of it. Its program was then simplified in place by
            `functionalize`, unless *program* is that of another network.
        graph: The graph as torch.export made it, as a module that runs; maybe that of another network.
        fingerprint: The hash of this graph; None if it cannot be hashed.
        program: Its functional program, without what its outputs do not need.
        root: The Merkle root of *program*.
    """

    role: str
    network: nn.Module
    deployed: Deployed
    tensors: Mapping[str, Tensor]
    hashes: Mapping[str, str]
    trace: Trace
    graph: fx.GraphModule
    fingerprint: str | None
    program: ExportedProgram
    root: ProgramRoot

    @classmethod
    def of(
        cls,
        role: str,
        network: nn.Module,
        preprocess: Preprocess,
        batch: BatchRange,
        other: "Compared | None" = None,
    ) -> "Compared":
        """Hash and capture *network*.

        If torch.export makes the same program of it as of *other*, the graph and the functional
        program of *other* are used again, because making them takes longer than torch.export.
        Raises the errors of the capture and of `program_root`.
        """
        tensors_by_name = tensors(network)
        hash_of = TensorHashes()
        hashes = {name: hash_of(tensor) for name, tensor in tensors_by_name.items()}

        traced = trace(network, preprocess, batch)
        sha256 = fingerprint(traced.program, hash_of)

        # What is made of its program, or was made of the same program of *other*. `graph` is a
        # copy, because `functionalize` changes the original.
        if other is not None and sha256 is not None and sha256 == other.fingerprint:
            graph = other.graph
            program = other.program
            root = other.root
        else:
            graph = traced.program.module(check_guards=False)
            program = functionalize(traced.program, batch)
            root = program_root(program, hash_of)

        return cls(
            role=role,
            network=network,
            deployed=Deployed(network, preprocess).eval(),
            tensors=tensors_by_name,
            hashes=hashes,
            trace=traced,
            graph=graph,
            fingerprint=sha256,
            program=program,
            root=root,
        )

    @property
    def needed(self) -> set[str]:
        """The names of the tensors that the outputs depend on: all names of each, if it has several."""
        return self._with_other_names(
            {name.removeprefix(NETWORK_PREFIX) for name in self.root.tensors}
        )

    @property
    def used(self) -> set[str]:
        """The names in `needed`, and the names of tensors that code of the network reads as Python numbers.

        A tensor does not count that code reads in a part whose results nothing needs.
        """
        needed = self.needed
        read = self._with_other_names(self.trace.read_names)
        outside = {name for name in read if not self._is_in_unneeded_part(name, needed, read)}
        return needed | self._with_other_names(outside)

    def _is_in_unneeded_part(self, name: str, needed: Set[str], read: Set[str]) -> bool:
        """Return whether the tensor *name* is in a part without operations in the graph and without *needed* tensors.

        The part must also have a tensor that is not *read*, which the code of another part would not have.
        """
        parts = name.split(".")[:-1]

        for depth in range(1, len(parts) + 1):
            part = ".".join(parts[:depth])
            inside = {each for each in self.tensors if is_in(each, part)}
            runs = any(is_in(module, part) for module in self.root.modules)
            if not runs and inside.isdisjoint(needed) and not inside <= read:
                return True

        return False

    def _with_other_names(self, names: Set[str]) -> set[str]:
        """Return all names of the tensors of the network that have one of *names*."""
        ids = {id(self.tensors[name]) for name in names & self.tensors.keys()}
        return {name for name, tensor in self.tensors.items() if id(tensor) in ids}


def rename_with_prefix(
    plain: nn.Module, kept: set[str], rename: Callable[[str], str]
) -> Callable[[str], str]:
    """Extend *rename* by the prefix that one of the two networks has in front of all its names.

    *rename* maps the names *kept* of the trained network to names of *plain*. It is returned as
    it is if these are already equal, or differ by more than a prefix.
    """
    names = set(tensors(plain))
    renamed = {rename(name) for name in kept}
    if names == renamed or not names or not renamed:
        return rename

    # If the networks differ by a prefix only, their shortest names (the first of several) are
    # those of the same tensor, and one of these two names has the prefix in front.
    shortest = min(sorted(names), key=len)
    shortest_renamed = min(sorted(renamed), key=len)
    extra_prefix = shortest_renamed.removesuffix(shortest)
    missing_prefix = shortest.removesuffix(shortest_renamed)
    if {name.removeprefix(extra_prefix) for name in renamed} == names:
        return lambda name: rename(name).removeprefix(extra_prefix)
    if {missing_prefix + name for name in renamed} == names:
        return lambda name: missing_prefix + rename(name)
    return rename


def build_plain(
    detachment: Detachment, trained: Compared, preprocess: Preprocess, batch: BatchRange
) -> Compared:
    """Build the plain network of *detachment*, with the weights of *trained* outside of removed parts.

    `detachment.rename` maps the name of a tensor in *trained* to its name in the plain network.
    Buffers that checkpoints do not store must follow from the config, so they are compared
    instead of copied. Raises `CertificateError` if such a buffer differs, if the networks have
    tensors of other names or shapes, or if the plain network cannot be captured.
    """
    if detachment.plain is None:
        raise CertificateError("there is no plain network to compare with")
    plain = detachment.plain()
    parts = detachment.training_only
    kept = {name: tensor for name, tensor in trained.tensors.items() if not is_in(name, *parts)}

    # The names of a plain network may have another prefix. A rebuilt network still has the parts
    # that are removed from the trained one; they are not compared.
    rename = detachment.rename
    plain_tensors = tensors(plain)
    if detachment.role == "plain":
        rename = rename_with_prefix(plain, {*kept}, rename)
    else:
        plain_tensors = {
            name: tensor for name, tensor in plain_tensors.items() if not is_in(name, *parts)
        }

    # Give it the outputs of the trained network, and the layout in which this one reads images.
    embedding_layer = vars(trained.network).get(EXPORT_EMBEDDING)
    if embedding_layer is not None:  # *rename* takes names of tensors, such as its weight
        renamed_weight = rename(f"{embedding_layer}.weight")
        vars(plain)[EXPORT_EMBEDDING] = renamed_weight.removesuffix(".weight")
    vars(plain)[IMAGES_FORMAT] = images_format(trained.network)

    # Each kept tensor of the trained network must be one of the plain network, and the other way
    # round.
    weights = {rename(name): tensor for name, tensor in kept.items()}
    if len(weights) != len(kept):
        raise CertificateError("rename gives two tensors of the trained network the same name")
    # A tensor of several names, such as a weight that is tied into a branch, may keep one of them.
    known = {id(tensor) for name, tensor in weights.items() if name in plain_tensors}
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if name in plain_tensors or id(tensor) not in known
    }
    _check_names(weights.keys(), plain_tensors.keys(), parts)

    # A buffer that no state dict stores is compared if the outputs need it, unless the capture
    # of the trained network created it: that of the plain network creates it, too.
    created = trained.trace.created
    needed = {rename(name) for name in trained.needed if name not in created}
    left_out = unstored_buffers(plain).keys() - needed
    weights = {name: weight for name, weight in weights.items() if name not in left_out}

    # If such a buffer differs, an earlier run of the trained network may have replaced it, so let
    # a run of the plain network do so, too. If it still differs, `_load` raises an error.
    unstored = unstored_buffers(plain).keys() & weights.keys()
    if not all(are_equal(plain_tensors[name], weights[name]) for name in unstored):
        create_buffers(plain, preprocess)
        plain_tensors = {name: tensors(plain)[name] for name in weights}

    _load(plain, plain_tensors, weights)
    plain.eval()
    try:
        return Compared.of(detachment.role, plain, preprocess, batch, trained)
    except LoweringError as error:
        raise CertificateError(f"{detachment.role} network: {error}") from error


def _check_names(weights: Set[str], plain_tensors: Set[str], removed: Sequence[str]) -> None:
    """Raise `CertificateError` unless the names of *weights* and *plain_tensors* are the same.

    *removed* are the parts that are removed from the trained network.
    """
    missing = sorted(plain_tensors - weights)
    left = [part for part in removed if any(is_in(name, part) for name in missing)]
    if left:
        raise CertificateError(
            f"the plain network still has {left[0]}, which is removed from the trained one; build it without "
            f"{left[0]}, for example by an option such as aux_logits=false",
            setting="plain",
        )
    if missing:
        raise CertificateError(
            f"the plain network needs {missing[0]}, which the trained one lacks; check its options"
        )

    extra = sorted(weights - plain_tensors)
    if extra:
        # The outermost part that the plain network lacks as a whole
        words = extra[0].split(".")
        outer = [".".join(words[:depth]) for depth in range(1, len(words) + 1)]
        part = next(
            part for part in outer if not any(is_in(name, part) for name in plain_tensors)
        )
        raise CertificateError(
            f"the trained network still has {extra[0]}, which the plain one lacks; check the options of the "
            "plain network or, if only training needs it,",
            remedies={"training_only": part},  # completes the sentence
        )


@torch.no_grad()
def _load(
    plain: nn.Module, plain_tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Copy *weights* to *plain_tensors*, those of *plain*, with their strides, on which a graph can depend.

    Buffers that no state dict stores are compared instead. Raises `CertificateError` if one
    differs, or if a weight has another shape or dtype than its plain tensor.
    """
    unstored = unstored_buffers(plain)

    for name, weight in weights.items():
        tensor = plain_tensors[name]
        if weight.shape != tensor.shape or weight.dtype != tensor.dtype:
            raise CertificateError(
                f"{name} has a different shape or dtype in the plain network"
            )

        if name in unstored:
            if not are_equal(tensor, weight):
                raise CertificateError(
                    f"{name} differs from the plain network's; checkpoints do not store this buffer, "
                    "so its values must follow from the config"
                )
        elif weight.stride() == tensor.stride():
            tensor.copy_(weight)
        else:
            tensor.data = weight.detach().clone()
