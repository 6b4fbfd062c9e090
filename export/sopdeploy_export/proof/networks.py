"""The networks of an export: the trained one, its copy without training-only parts, and checks of both.

Training-only parts are the second-order branches of DSoP (section III-A), the noise weights of the GM-SOP
gate and auxiliary classifiers such as those of GoogLeNet.

The checks cover the state of torch, of the modules and of their memory. A wrong state, such as active
autocast or a forward hook, would change the plain network in the same way as the trained one, or would not be
captured. The comparisons of the certificate could not detect it.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sopdeploy.backbones.base import Backbone
from sopdeploy.decision import Decision
from sopdeploy.errors import CertificateError, DetachError, LoweringError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import IMAGES_FORMAT, Normalize, images_format
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.plugins import plugin_versions
from sopdeploy.project import Origin
from sopdeploy_export.graph.capture import EXPORT_EMBEDDING, Captured, generated_images
from sopdeploy_export.program_hashes import are_equal, copy_hashed, stored_hash, tensor_hash
from sopdeploy_export.state import modules, tensors, unstored_buffers
from sopdeploy_export.stubs import (
    SIZES,
    Recording,
    make_stubs,
    record_calls,
    removed_modules,
    without_values,
)

LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}
REMOVED_BY = {  # the function that removes a hook of this class in torch.nn.utils
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "BasePruningMethod": "torch.nn.utils.prune.remove",
}
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Detachment:
    """The modules to remove from a trained network, and the plain network that must remain.

    Attributes:
        training_only: Dotted names of the removed parts.
        plain: Builds the plain network, with any weights; `None` if there is none to compare with.
        reference: What *plain* builds: the `plain` network, or with the builder of the trained network a
            `rebuilt` one.
        rename: Maps the name of a tensor of the trained network to its name in the plain network.
        captured: The programs of the trained network, if it was captured already, with contiguous tensors.
    """

    training_only: tuple[str, ...] = ()
    plain: Callable[[], nn.Module] | None = None
    reference: Literal["plain", "rebuilt"] = "plain"
    rename: Callable[[str], str] = str
    captured: Captured | None = None

    @classmethod
    def of(cls, network: Classifier) -> "Detachment":
        """Build the detachment that *network*, a network of the catalog, declares."""

        def plain() -> Backbone:
            built = network.inference_model()
            built.outputs = network.outputs  # so that both return the same values
            return built

        return cls(training_only=network.training_only, plain=plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSubject:
    """A trained network to export.

    `pipeline.export_checkpoint` creates one from a checkpoint, `export_network` from any network.

    Attributes:
        name: Name of the network, such as `dsop-resnet18`.
        project: Name of the project, which names the bundle.
        network: The network as it was trained, in eval mode.
        detachment: The training-only parts, and the plain network that must remain without them.
        labels: Class names, in the order of the logits.
        preprocess: Converts an image to the input of the network.
        config: The options that the network was built with, for the manifest.
        sha256: Hash of the checkpoint or weight file; for a network in memory, of its tensors.
        decision: How logits become classes; `None` for softmax without thresholds.
        training: Recipe, epoch and metrics, for the model card.
        origin: The run and its images; `None` if `train` did not train the network.
        warnings: Findings of the checks that do not stop the export.
    """

    name: str
    project: str
    network: nn.Module
    detachment: Detachment
    labels: tuple[str, ...]
    preprocess: Preprocess
    config: Mapping[str, Any]
    sha256: str
    decision: Decision | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    warnings: tuple[str, ...] = ()

    def plugins(self) -> dict[str, str]:
        """Return the versions of the plug-ins that define parts of the network or provided its images."""
        recorded = self.training.get("plugins")
        versions = recorded if isinstance(recorded, dict) else {}  # checkpoints can hold anything
        return {
            **{str(name): str(versions[name]) for name in versions},
            **plugin_versions(self.network.modules()),
        }


def detach(
    network: _Network, training_only: tuple[str, ...] | None = None, pixels: Tensor | None = None
) -> _Network:
    """Return a copy of *network*, in eval mode, without its *training_only* parts.

    *training_only* defaults to the parts that a network of the catalog declares. Returns *network* itself,
    in its mode, if there are none, and for a network of the catalog also if they have no tensors, as an empty
    list of branches. In a network outside of the catalog, stubs take the place of removed parts; *pixels*,
    normalized images (3, 3, H, W), show what the parts return.

    Raises `DetachError` if a name does not exist, and `LoweringError` if a part cannot have a stub.
    """
    is_of_catalog = isinstance(network, Classifier)
    if training_only is None:
        training_only = network.training_only if isinstance(network, Classifier) else ()
    owners = [_find_owner(network, name) for name in training_only]  # raises for an unknown name
    if not training_only or (is_of_catalog and not has_tensors(network, training_only)):
        return network
    removed = [getattr(owner, attribute) for owner, attribute in owners]
    substitutes: dict[int, Any] = {}  # what `copy.deepcopy` puts in place of the object with an id
    if is_of_catalog:
        substitutes = dict.fromkeys(map(id, removed))
    else:
        parts = removed_modules(network, training_only)
        recording = Recording((), ())
        if parts and pixels is not None:
            recording = record_calls(copy_module(network), training_only, pixels)
        substitutes = {id(part): without_values(part) for part in removed if isinstance(part, Tensor)}
        substitutes |= make_stubs(parts, recording)
    detached = copy_module(network, memo=substitutes)
    for name in training_only:
        owner, attribute = _find_owner(detached, name)
        substitute = getattr(owner, attribute)
        if is_of_catalog:
            delattr(owner, attribute)
        elif isinstance(substitute, Tensor):
            delattr(owner, attribute)
            vars(owner)[attribute] = substitute  # no parameter or buffer any more
    detached.eval()
    return detached


def probe_pixels(network: nn.Module, preprocess: Preprocess) -> Tensor:
    """Normalize the last of the generated images, in the layout of *network*: (3, 3, H, W)."""
    images = torch.from_numpy(generated_images(preprocess.crop)[-max(SIZES) :])
    return Normalize(preprocess, images_format(network))(images)


def has_tensors(network: nn.Module, parts: tuple[str, ...]) -> bool:
    """Return whether any of *parts* of *network* has a parameter or a buffer."""
    return any(is_in(name, *parts) for name in tensors(network))


def _find_owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the part *name* of *network*, and the attribute that it is held by."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = network.get_submodule(path)
    except AttributeError as error:
        raise DetachError(f"{type(network).__name__}: no part named {name}; it has no {path}") from error
    if attribute not in {*owner._modules, *owner._parameters, *owner._buffers}:
        raise DetachError(
            f"{type(network).__name__}: no part named {name}; it is already detached, or `training_only` "
            "names a part that does not exist"
        )
    return owner, attribute


def check_torch_state() -> None:
    """Reject another default type than float32, autocast, torch modes and hooks on all modules.

    These change the operations of every network in the same way: the three networks would agree, but the
    exported file would compute something else. Raises `CertificateError` with the name of the mode.
    """
    if torch.get_default_dtype() != torch.float32:
        raise CertificateError(
            f"torch.set_default_dtype({torch.get_default_dtype()}) is active; set it back to torch.float32"
        )
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise CertificateError(f"torch.autocast is active for {device}; export outside of it")
    for kind, modes in (
        ("function", _get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
        ("dispatch", _get_current_dispatch_mode_stack()),
    ):
        if modes:
            name = type(modes[-1]).__name__
            raise CertificateError(f"the torch {kind} mode {name} is active; export outside of it")
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        raise CertificateError("a forward hook is registered on all modules; remove it before the export")


def check_hooks(network: nn.Module, role: str, removed: tuple[str, ...] = ()) -> None:
    """Raise `CertificateError` if a module of *network* outside of its *removed* parts has a forward hook."""
    for name, module in modules(network):
        if is_in(name, *removed):
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            where = name or "the whole network"
            hook, *_ = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
            kind = next((kind for kind in type(hook).__mro__ if kind.__name__ in REMOVED_BY), None)
            remedy = "remove it first" if kind is None else f"call {REMOVED_BY[kind.__name__]} first"
            raise CertificateError(f"the {role} network has a forward hook on {where}; {remedy}")


def check_network_state(network: nn.Module, role: str, removed: tuple[str, ...] = ()) -> None:
    """Raise `CertificateError` for train mode, hooks, or a tensor whose memory does not hold its values.

    Modes and hooks of the *removed* parts do not matter.
    """
    for name, module in modules(network):
        if module.training and not is_in(name, *removed):
            remedy = "call .eval() first"
            if type(module).train is not nn.Module.train:
                kind = type(module).__name__
                remedy = f"{kind}.train() keeps it there after .eval(): replace it by a layer that does not"
            where = name or "the whole network"
            raise CertificateError(f"the {role} network is in train mode ({where}); {remedy}")
    check_hooks(network, role, removed)
    for name, tensor in tensors(network).items():
        where = f"the {role} network's {name}"
        if tensor.is_meta:
            raise CertificateError(f"{where} has no values (device meta); load its weights first")
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise CertificateError(f"{where} has the layout {layout}; replace it by its .to_dense()")
        if tensor.is_neg() or tensor.is_conj():
            view, resolve = "conjugated", "resolve_conj"
            if tensor.is_neg():
                view, resolve = "negated", "resolve_neg"
            remedy = f"replace it by its .{resolve}()"
            raise CertificateError(f"{where} is a {view} view, whose memory holds other numbers; {remedy}")


def copy_module(network: _Network, memo: dict[int, Any] | None = None) -> _Network:
    """Copy *network* with `copy.deepcopy` and its *memo*; the locks of modules become new ones.

    Raises `LoweringError` if this fails, or if a `__deepcopy__` returns another class or parts of *network*.
    """
    memo = {} if memo is None else memo
    for _, module in modules(network):
        for value in vars(module).values():
            if type(value) in LOCKS:  # which deepcopy cannot copy
                memo[id(value)] = LOCKS[type(value)]()
    try:
        copied = copy.deepcopy(network, memo)
    except Exception as error:  # classes can define how they are copied
        raise LoweringError(f"the network cannot be copied: {first_line(error)}") from error
    originals = {id(module) for _, module in modules(network)}
    kind = fx.GraphModule if isinstance(network, fx.GraphModule) else type(network)  # each has its own class
    if not isinstance(copied, kind) or any(id(module) in originals for _, module in modules(copied)):
        raise LoweringError("the network is not copied by copy.deepcopy; remove its __deepcopy__")
    return copied


def with_contiguous_tensors(network: _Network) -> _Network:
    """Return *network*, or a copy with contiguous tensors if any is not: graphs contain the strides.

    The copy keeps the layout of the images, which may follow from the strides.
    """
    if all(tensor.is_contiguous() for tensor in tensors(network).values()):
        return network
    copied = copy_module(network)
    vars(copied)[IMAGES_FORMAT] = images_format(network)
    for tensor in tensors(copied).values():
        tensor.data = tensor.detach().contiguous()
    return copied


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A network of the comparison whose state was checked; what is known of it is computed once.

    Attributes:
        role: `trained`, `detached`, `plain` or `rebuilt`.
        original: The network of the caller.
        network: *original*, or a copy with contiguous tensors if any is not.
        tensors: The tensors of *network* by name.
        hashes: The sha256 of each, before anything ran.
    """

    role: str
    original: nn.Module
    network: nn.Module
    tensors: Mapping[str, Tensor]
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, role: str, original: nn.Module, removed: tuple[str, ...] = ()) -> "Prepared":
        """Prepare *original*; raises `CertificateError` for a wrong state outside of its *removed* parts."""
        check_network_state(original, role, removed)
        network = with_contiguous_tensors(original)
        named = tensors(network)
        hashes = {name: stored_hash(tensor) for name, tensor in named.items()}
        return cls(role=role, original=original, network=network, tensors=named, hashes=hashes)

    def check_unchanged(self, removed: Set[str]) -> None:
        """Raise `CertificateError` if a tensor that is not *removed* changed, also in the original network.

        Code outside of the graph may have written to it in a way that its version does not show.
        """
        networks = [self.original] if self.network is self.original else [self.original, self.network]
        for network in networks:
            current = tensors(network)
            for name in self.hashes.keys() - removed:
                if name not in current or tensor_hash(current[name]) != self.hashes[name]:
                    problem = f"{name} changed during the proof, in the {self.role} network"
                    raise CertificateError(f"{problem}; forward must not write to it")


def rename_with_prefix(
    plain: nn.Module, detached: nn.Module, rename: Callable[[str], str]
) -> Callable[[str], str]:
    """Extend *rename*, from names of *detached* to names of *plain*, by a prefix that one of them has.

    Returns *rename* itself if the names are already equal, or differ by more than a prefix.
    """
    names, renamed = set(tensors(plain)), {rename(name) for name in tensors(detached)}
    if names == renamed or not names or not renamed:
        return rename
    # The shortest name of each network, of equal ones the first, is that of the same tensor.
    shortest, shortest_renamed = (min(sorted(group), key=len) for group in (names, renamed))
    surplus = shortest_renamed.removesuffix(shortest)
    missing = shortest.removesuffix(shortest_renamed)
    if {name.removeprefix(surplus) for name in renamed} == names:
        return lambda name: rename(name).removeprefix(surplus)
    if {missing + name for name in renamed} == names:
        return lambda name: missing + rename(name)
    return rename


def load_plain_network(detachment: Detachment, source: Prepared) -> Prepared:
    """Build the plain network of *detachment* and copy the weights of *source*, the detached one, into it.

    `rename` maps the name of a tensor in *source* to its name in the plain network. Buffers that checkpoints
    do not store follow from the config, so they are compared instead of copied. Raises `CertificateError` if
    such a buffer differs, or if the networks have tensors of other names or shapes.
    """
    if detachment.plain is None:
        raise CertificateError("there is no builder of a plain network")
    plain, detached = detachment.plain(), source.network
    rename = rename_with_prefix(plain, detached, detachment.rename)
    embedding_layer = vars(detached).get(EXPORT_EMBEDDING)
    if embedding_layer is not None:  # *rename* takes names of tensors, such as its weight
        vars(plain)[EXPORT_EMBEDDING] = rename(f"{embedding_layer}.weight").removesuffix(".weight")
    vars(plain)[IMAGES_FORMAT] = images_format(detached)
    plain_tensors = tensors(plain)
    renamed = {rename(name): tensor for name, tensor in source.tensors.items()}
    if len(renamed) != len(source.tensors):
        raise CertificateError("rename gives two tensors of the trained network the same name")
    if missing := sorted(plain_tensors.keys() - renamed.keys()):
        raise CertificateError(f"the plain network needs {missing[0]}, which the detached one lacks")
    if extra := sorted(renamed.keys() - plain_tensors.keys()):
        raise CertificateError(f"the detached network still has {extra[0]}, which the plain one lacks")
    unstored = unstored_buffers(plain)
    with torch.no_grad():
        for name, tensor in plain_tensors.items():
            weight = renamed[name]
            if weight.shape != tensor.shape or weight.dtype != tensor.dtype:
                raise CertificateError(f"{name} has a different shape or dtype in the plain network")
            if name not in unstored:
                copy_hashed(weight, tensor)
            elif not are_equal(tensor, weight):
                raise CertificateError(
                    f"{name} differs from the plain network's; checkpoints do not store this buffer, "
                    "so its values must follow from the config"
                )
    plain.eval()
    return Prepared.of(detachment.reference, plain)
