"""DSoP and iSQRT-COV on a convolutional network of the user, trained by any loop.

`dsop` and `isqrt` apply them to a network in memory. `register_model` gives a network a name,
so that training, evaluation and export of this package accept it as one of the catalog. Only
the process that registers a network knows it: reading a checkpoint never imports code.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sopdeploy.base.config import FieldValues, StrictModel
from sopdeploy.base.plugins import MODELS
from sopdeploy.errors import ConfigError, describe_known, first_line
from sopdeploy.layers.pooling.covariance import ISqrtPoolingConfig
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.backbones.base import Backbone, initialize
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.dsop import DSoP, DSoPConfig
from sopdeploy.models.registry import CATALOG, Entry, parse_options
from sopdeploy.models.timm_networks import nearest_block

Trained = TypeVar("Trained", bound="UserNetwork")


class Source(NamedTuple):
    """Where a network of the user comes from: its builder, the method's taps, an image size it accepts."""

    build: Callable[[int], nn.Module]
    taps: tuple[str, ...]
    image_size: int


class UserNetwork(Classifier):
    """A network of the user as a classifier; its tensors are under `network`."""

    def __init__(self, config: StrictModel, num_classes: int, source: Source) -> None:
        super().__init__(config, num_classes)
        self.network = source.build(num_classes)
        self.source = source
        self.set_taps()

    def set_taps(self) -> None:
        """Set `tap_channels` to the channels of the taps; check the number of logits if there are taps."""
        if self.source.taps:
            self.tap_channels, logits = find_taps(
                self.network, self.source.taps, self.source.image_size
            )
            if logits != self.num_classes:
                raise ConfigError(
                    f"taps: the network returns {logits} logits for "
                    f"{self.num_classes} classes; use the number that the builder "
                    "receives"
                )

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build the block that `nearest_block` selects."""
        return nearest_block(self.network, self.tap_channels)(in_channels, out_channels, stride)

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the logits, in the place of the last feature map, and the outputs of *taps*.

        The outputs are in the order of computation. Raises `ConfigError` if the network does
        not return a tensor.
        """
        logits, outputs = run_tapped(self.network, images, taps)
        if not isinstance(logits, Tensor):
            mode = "train" if self.training else "eval"
            raise ConfigError(
                f"the network returns a {type(logits).__name__} in {mode} mode, not logits; build it without "
                "auxiliary outputs"
            )
        return logits, list(outputs.values())

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, which `feature_maps` computes."""
        return features

    def channels_of_maps(self, taps: Sequence[str] | None) -> dict[str, int]:
        """Run one image to find the number of channels at each of the modules *taps*.

        With `None`, it is that of the last feature map only. Raises `ConfigError` for an unknown
        module, one without a feature map, or a network that cannot run.
        """
        side = self.source.image_size
        modules = (find_last_map(self.network, side),) if taps is None else taps
        channels, _ = find_taps(self.network, modules, side)
        return channels

    def remove_classifier(self) -> int:
        """Replace the last linear layer by the identity; return the length of its input.

        Raises `ConfigError` if there is none, or if the network does not return its output.
        """
        layer = Classifier.logits_layer(self)
        if layer is not None:
            name = next(
                name for name, module in self.network.named_modules() if module is layer
            )

            # The logits must be what this layer returned.
            logits, outputs = run_once(self.network, self.source.image_size)
            output: Any = outputs.get(name)  # `None` if the layer does not run in eval mode
            has_same_shape = isinstance(output, Tensor) and _shape(logits) == output.shape
            # Tensors on `meta` have no values to compare.
            if not has_same_shape or not (logits.is_meta or torch.equal(logits, output)):
                raise ConfigError(
                    "head: the network does not return the output of its "
                    f"last linear layer {name}; change it to return this output as "
                    "the logits"
                )
        return super().remove_classifier()

    @property
    def num_features(self) -> int:
        """The length of the vector that the last linear layer reads; 0 without one."""
        layer = self.logits_layer()
        return 0 if layer is None else layer.in_features


class DSoPNetwork(DSoP, UserNetwork):
    """A network of the user with DSoP's branches, by the assumptions of `DSoPTimm`."""

    taps_are_stages = True
    normalize_branches = True
    config: DSoPConfig


class PooledOptions(StrictModel):
    """Any global pooling of the package, iSQRT-COV by default."""

    pooling: Pooling = ISqrtPoolingConfig()


class PooledNetwork(UserNetwork):
    """A network of the user up to a feature map, its last one or the tap; pooling and classifier follow."""

    # Not those of `UserNetwork`, whose network has its own classifier
    classify = Backbone.classify
    remove_classifier = Classifier.remove_classifier
    config: PooledOptions

    def __init__(self, config: PooledOptions, num_classes: int, source: Source) -> None:
        super().__init__(config, num_classes, source)
        self.add_classifier(config.pooling)
        initialize(self.pooling)

    def set_taps(self) -> None:
        """Set `tap` and `tap_channels` to the pooled map, and remove what follows it from the network."""
        taps = self.source.taps
        if len(taps) > 1:
            raise ConfigError(f"taps: this method reads one feature map, not {len(taps)}")
        self.tap_channels = self.channels_of_maps(taps or None)  # without a tap, the last map
        self.tap = next(iter(self.tap_channels))
        remove_after(self.network, self.tap, self.source.image_size)

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the map (B, C, h, w) and the outputs of *taps*."""
        _, outputs = run_tapped(self.network, images, {self.tap, *taps})
        return outputs[self.tap], [output for tap, output in outputs.items() if tap in taps]


MethodName = Literal["none", "dsop", "isqrt"]
METHODS: dict[MethodName, tuple[type[UserNetwork], type[StrictModel]]] = {
    "none": (UserNetwork, StrictModel),
    "dsop": (DSoPNetwork, DSoPConfig),
    "isqrt": (PooledNetwork, PooledOptions),
}


def dsop(
    network: nn.Module, taps: Sequence[str], *, image_size: int = 224, **config: Any
) -> DSoPNetwork:
    """Attach DSoP's second-order branches to the convolutional *network*, to train it with them.

    In train mode, the result maps normalized float images (B, 3, H, W) to a `TrainingOutput`:
    `logits` (B, classes) of the network and `branches`, a dict with the (B, classes) logits of
    each branch. Minimize the sum of their losses. In eval mode it returns the logits of the
    network alone. `export_network(..., training_only=["branches"])` removes the branches and
    proves it.

    Args:
        network: Maps images to (B, classes) logits in train and in eval mode. It becomes the part `network`
            of the result and is not copied.
        taps: Names of modules with outputs (B, C, h, w), such as `["layer2", "layer3"]`. Each gets a branch.
        image_size: Side in pixels of an image that the network accepts; it is run once to find C.
        **config: Options of `DSoPConfig`, with one value per tap in the order of computation, such as
            `aux_widths=(64, 128)`.

    Returns:
        A module with the parts `network` and `branches`.

    Raises:
        ConfigError: An unknown tap, a tap without a feature map, an invalid option, or a network that cannot
            run.

    Examples:
        >>> import timm
        >>> network = timm.create_model("test_resnet", num_classes=3)
        >>> network = sopdeploy.dsop(network, ["layer2", "layer3"], image_size=64, aux_blocks=(1, 1))
        >>> output = network(torch.zeros(2, 3, 64, 64))
        >>> output.logits.shape, list(output.branches)
        (torch.Size([2, 3]), ['layer2', 'layer3'])
    """
    return _build_from_network(DSoPNetwork, "dsop", network, taps, image_size, config)


def isqrt(
    network: nn.Module, *, tap: str | None = None, image_size: int = 224, **config: Any
) -> PooledNetwork:
    """Replace what follows a feature map of *network* by iSQRT-COV and a linear layer.

    Args:
        network: As for `dsop`; the modules with parameters behind the map are removed from it.
        tap: Name of the module that returns the map (B, C, h, w), by default the last one that does.
        image_size: Side in pixels of an image that the network accepts.
        **config: `pooling` selects another pooling or its options, such as `{"kind": "isqrt", "width": 128}`
            or "bcnn".

    Returns:
        A module with the parts `network`, `pooling` and `fc`.

    Raises:
        ConfigError: No such module or map, an invalid option, or a network that cannot run.

    Examples:
        >>> import timm
        >>> network = timm.create_model("test_resnet", num_classes=3)
        >>> network = sopdeploy.isqrt(network, image_size=64, pooling={"kind": "isqrt", "width": 16})
        >>> network.fc
        Linear(in_features=136, out_features=3, bias=True)
    """
    return _build_from_network(
        PooledNetwork, "isqrt", network, (tap,) if tap else (), image_size, config
    )


def _build_from_network(
    network_class: type[Trained],
    name: MethodName,
    network: nn.Module,
    taps: Sequence[str],
    image_size: int,
    config: FieldValues,
) -> Trained:
    """Build the *network_class* of the method *name* from *network*, with as many logits as *network*."""
    _, config_class = METHODS[name]
    options = parse_options(name, config_class, config)
    _, num_classes = find_taps(network, taps, image_size)
    # `network_class` calls `build` for its part `network`, which exists already, with this
    # number of classes.
    source = Source(build=lambda _num_classes: network, taps=tuple(taps), image_size=image_size)
    return network_class(options, num_classes, source)


def register_model(
    name: str,
    build: Callable[[int], nn.Module],
    *,
    taps: Sequence[str] = (),
    image_size: int = 224,
    method: MethodName | None = None,
) -> None:
    """Give a network of the user the *name* under which this process trains, evaluates and exports it.

    Training and export build the network with the code given here. Another process that reads
    its checkpoint must register it, too.

    Args:
        name: Name for `model.name` of a recipe: letters, digits, `.`, `_` and `-`.
        build: Builds the network for a number of classes, with new parts in every call.
        taps: The modules at which the method is applied: for "dsop" one or more, for "isqrt" the one that
            returns the feature map to pool, by default the last one.
        image_size: Side in pixels of an image that the network accepts.
        method: Name of the function of this module that is applied; `model.config` of a recipe has its
            options. The default is "dsop" with taps, and "none", the network as it is, without.

    Raises:
        ConfigError: *name* names a network of the catalog or of another module, or has other characters,
            or the method needs taps.

    Examples:
        >>> import timm
        >>> build = lambda classes: timm.create_model("test_resnet", num_classes=classes)
        >>> sopdeploy.register_model("my-resnet", build, taps=["layer2", "layer3"], image_size=64)
        >>> sopdeploy.create_model("my-resnet", 5, aux_blocks=(1, 1)).num_classes
        5
    """
    # What cannot be registered: a name of the catalog, and DSoP without taps.
    if name in CATALOG:
        raise ConfigError(f"model {name!r}: is a network of the catalog; choose another name")
    if method is None:
        method = "dsop" if taps else "none"
    if method == "dsop" and not taps:
        raise ConfigError(
            "register_model: method 'dsop' needs taps; name modules of the network"
        )
    method_class, config_class = METHODS[method]

    # Classes of this network, which know how to build it.
    source = Source(partial(_call_builder, name, build), tuple(taps), image_size)
    module = build.__module__
    inference = None
    if method_class.training_only:  # it is exported as the network without a method
        inference = _with_source(UserNetwork, source, module, inference_class=None)
    network = _with_source(method_class, source, module, inference_class=inference)

    new_entry = Entry(
        network_source=network,
        config_source=config_class,
        defaults={},
        summary=f"of {module}",
        image_size=image_size,
    )
    MODELS.register(name, new_entry, module)


def _with_source(
    base: type[UserNetwork],
    source: Source,
    module: str,
    inference_class: type[Classifier] | None,
) -> type[UserNetwork]:
    """Derive a class from *base* that gets *source* from here: the catalog gives config and classes only.

    Its checkpoints record the version of the package of *module*. *inference_class* is the class
    of the network that is exported; None: it is exported as it is.
    """

    def initialize_with_source(
        self: UserNetwork, config: StrictModel, num_classes: int
    ) -> None:
        base.__init__(self, config, num_classes, source)

    # By `__module__`, training finds the package.
    members = {
        "__init__": initialize_with_source,
        "__module__": module,
        "inference_class": inference_class,
    }
    return type(base.__name__, (base,), members)


def _call_builder(name: str, build: Callable[[int], nn.Module], num_classes: int) -> nn.Module:
    """Call *build*; raise its errors as `ConfigError`."""
    try:
        return build(num_classes)
    except Exception as error:  # the user's code
        raise ConfigError(
            f"{name}: cannot be built ({first_line(error)}); correct the builder"
        ) from error


def run_tapped(
    network: nn.Module, images: Tensor, taps: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """Run *network*; return its output and those of its modules *taps*, in the order of computation.

    A module that runs several times has the place of its first run and the output of its last.
    """
    # Hooks store what the taps return.
    outputs: dict[str, Any] = {}

    def store(tap: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[tap] = output

    handles = [
        network.get_submodule(tap).register_forward_hook(partial(store, tap)) for tap in taps
    ]
    try:
        return network(images), outputs
    finally:
        for handle in handles:
            handle.remove()


def run_once(network: nn.Module, image_size: int) -> tuple[Any, dict[str, Any]]:
    """Run *network* in eval mode on one black image; return its output and those of its modules by name.

    The image is gray if the network fails for RGB. The outputs are in the order of computation. Raises
    `ConfigError` if the network cannot run.
    """
    modes = {part: part.training for part in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), None)
    names = [name for name, _ in network.named_modules() if name]

    # One black image in eval mode; afterwards, all modules get their modes back.
    failures = []
    network.eval()
    try:
        for channels in (3, 1):
            image = torch.zeros(1, channels, image_size, image_size, device=device)
            try:
                with torch.no_grad():
                    return run_tapped(network, image, names)
            except Exception as error:  # the user's code
                failures.append(error)
    finally:
        for part, mode in modes.items():
            part.training = mode

    # If the number of channels was the first problem, the other failure has another reason.
    failure = failures[1] if describe_known(failures[0]) else failures[0]
    raise ConfigError(
        f"taps: the network fails for an image of {image_size} x {image_size} "
        f"({first_line(failure)}); give the image_size that it accepts"
    ) from failure


def find_taps(
    network: nn.Module, taps: Sequence[str], image_size: int
) -> tuple[dict[str, int], int]:
    """Run *network* on one black image to find the channels at *taps* and the number of classes.

    The taps are in the order of computation. Raises `ConfigError` for an unknown tap, one without a
    feature map, and a network that cannot run or returns no logits.
    """
    modules = dict(network.named_modules())
    for tap in taps:
        if tap not in modules:
            parts = ", ".join(name for name, _ in network.named_children())
            raise ConfigError(f"taps: the network has no module {tap!r}; it has {parts}")

    # What the taps return must be feature maps.
    logits, outputs = run_once(network, image_size)
    for tap in taps:
        shape = _shape(outputs.get(tap))
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ConfigError(
                f"taps: {tap} returns {shape or 'something other than a tensor'}, not a feature map "
                "(batch, channels, side, side); choose another module"
            )

    if len(_shape(logits)) != 2:
        raise ConfigError(
            f"taps: the network returns {_shape(logits)} for one image, not (1, classes)"
        )
    channels = {tap: output.shape[1] for tap, output in outputs.items() if tap in taps}
    return channels, logits.shape[1]


def _shape(output: Any) -> tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def find_last_map(network: nn.Module, image_size: int) -> str:
    """Find the outermost module of *network* that computes the last feature map (1, C, side, side).

    Raises `ConfigError` if there is none, or if tokens (1, N, C) follow: the map may be that of
    an attention.
    """
    _, outputs = run_once(network, image_size)
    # A module returns after the modules inside of it.
    for name, output in reversed(outputs.items()):
        shape = _shape(output)
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            return name
        if len(shape) == 3:
            break
    raise ConfigError(
        "taps: the network does not end in a feature map; name modules that return one, or, for a head, set "
        "head.kind=gap"
    )


def remove_after(network: nn.Module, tap: str, image_size: int) -> None:
    """Replace modules with parameters that run only after the module *tap* by the identity.

    Raises `ConfigError` if the network cannot run without them.
    """
    # What has parameters and returns only after the tap.
    _, outputs = run_once(network, image_size)
    names = list(outputs)  # in the order in which the modules first return
    removed = []
    for name in names[names.index(tap) + 1 :]:
        contains_tap = tap.startswith(f"{name}.")  # such a module returns after the tap, too
        if not contains_tap and list(network.get_submodule(name).parameters()):
            removed.append(name)

    for name in removed:
        # A module in a removed one goes with it.
        if not is_in(name.rpartition(".")[0], *removed):
            network.set_submodule(name, nn.Identity())
    run_once(network, image_size)
