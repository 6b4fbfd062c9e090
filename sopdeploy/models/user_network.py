"""DSoP's branches on a convolutional network of the user, trained by any loop.

`dsop` attaches branches to a network in memory. `register_model` gives a network a name, so that training,
evaluation and export of this package accept it as one of the catalog. Only the process that registers a
network knows it: reading a checkpoint never imports code.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.timm_backbone import nearest_block, run_tapped
from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ConfigError, first_line
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches
from sopdeploy.models.registry import CATALOG, REGISTERED

NAME = re.compile(r"[A-Za-z0-9._-]+")
BLOCKS, WIDTH = 2, 256  # of a branch: number of blocks, largest number of channels of the covariance


class NoOptions(StrictModel):
    """A registered network without branches has no options."""


class UserNetwork(Classifier):
    """A network of the user as a classifier; its tensors are under `network`."""

    def __init__(self, network: nn.Module, config: StrictModel, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.network = network

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build the block that `nearest_block` selects."""
        return nearest_block(self.network, self.tap_channels)(in_channels, out_channels, stride=stride)

    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute the logits, in place of the last feature map, and the outputs of *taps*."""
        logits, outputs = run_tapped(self.network, self.network, images, taps)
        if not isinstance(logits, Tensor):
            mode = "train" if self.training else "eval"
            raise ConfigError(
                f"the network returns a {type(logits).__name__} in {mode} mode, not logits; build it without "
                "auxiliary outputs"
            )
        return logits, list(outputs.values())

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, which `features` computes."""
        return features

    def map_channels(self, taps: Sequence[str] | None, image_size: int) -> dict[str, int]:
        """Run one image to find the channels at the modules *taps*; `None` is the last feature map.

        Raises `ConfigError` for an unknown module, one without a feature map, or a network that cannot run.
        """
        chosen = (last_map(self.network, image_size),) if taps is None else taps
        return find_taps(self.network, chosen, image_size)[0]

    def remove_classifier(self, image_size: int) -> int:
        """Replace the last linear layer; raise `ConfigError` if its output is not the network's."""
        layer = Classifier.logits_layer(self)
        if layer is not None:
            name = next(name for name, module in self.network.named_modules() if module is layer)
            with evaluated(self.network, image_size) as images:
                logits, outputs = run_tapped(self.network, self.network, images, [name])
            if not logits.is_meta and not torch.equal(logits, outputs[name]):
                raise ConfigError(
                    f"head: the network computes its logits after its last linear layer {name}; build it so "
                    "that this layer returns them"
                )
        return super().remove_classifier(image_size)

    def num_features(self) -> int:
        """Return the length of the vector that the last linear layer reads; 0 without one."""
        layer = self.logits_layer()
        return 0 if layer is None else layer.in_features


class DSoPNetwork(DSoP, UserNetwork):
    """A network of the user with DSoP's branches, as for networks of timm.

    Assumptions, because the paper does not cover these networks: a branch has two blocks of the kind that
    `nearest_block` selects, then batch norm and ReLU; covariances have at most 256 channels; all losses have
    the same weight.
    """

    taps_are_stages = True
    normalize_branches = True
    config: DSoPConfig

    def __init__(self, network: nn.Module, taps: Sequence[str], config: DSoPConfig, image_size: int) -> None:
        channels, num_classes = find_taps(network, taps, image_size)
        UserNetwork.__init__(self, network, config, num_classes)
        self.tap_channels = channels
        self.attach_branches()

    def paper_branches(self) -> PaperBranches:
        """Return two blocks and at most 256 channels for every tap."""
        count = len(self.tap_channels)
        return PaperBranches(
            blocks=(BLOCKS,) * count, widths=(WIDTH,) * count, weights=(1.0,) * count, strides=(1,) * count
        )


def dsop(network: nn.Module, taps: Sequence[str], *, image_size: int = 224, **config: Any) -> DSoPNetwork:
    """Attach DSoP's second-order branches to the convolutional *network*, to train it with them.

    In train mode, the result maps normalized float images (B, 3, H, W) to a `TrainingOutput`: `logits`
    (B, classes) of the network and `branches`, a dict with the (B, classes) logits of each branch. Minimize
    the sum of their losses. In eval mode it returns the logits of the network alone.
    `export_network(..., training_only=["branches"])` removes the branches and proves it.

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
    """
    try:
        options = DSoPConfig(**config)
    except pydantic.ValidationError as problem:
        known = ", ".join(DSoPConfig.model_fields)
        raise ConfigError(f"dsop: {first_problem(problem)}; its keys are {known}") from problem
    return DSoPNetwork(network, taps, options, image_size)


def register_model(
    name: str, build: Callable[[int], nn.Module], *, taps: Sequence[str] = (), image_size: int = 224
) -> None:
    """Give a network of the user the *name* under which this process trains, evaluates and exports it.

    Training and export build the network with the code given here. Another process that reads its checkpoint
    must register it, too.

    Args:
        name: Name for `model.name` of a recipe: letters, digits, `.`, `_` and `-`.
        build: Builds the network for a number of classes, with new parts in every call.
        taps: As for `dsop`; the options of the branches are `model.config` of a recipe. Without taps, the
            network is trained without branches.
        image_size: Side in pixels of an image that the network accepts.

    Raises:
        ConfigError: *name* is that of a network of the catalog, or has other characters.
    """
    if not NAME.fullmatch(name) or name in CATALOG:
        reason = "is a network of the catalog" if name in CATALOG else "use letters, digits, `.`, `_` and `-`"
        raise ConfigError(f"register_model: name {name!r}: {reason}")

    def plain(config: StrictModel, num_classes: int) -> UserNetwork:
        return UserNetwork(_build(name, build, num_classes), config, num_classes)

    class Plain(UserNetwork):
        def __init__(self, config: StrictModel, num_classes: int) -> None:
            super().__init__(_build(name, build, num_classes), config, num_classes)

    class Branched(DSoPNetwork):
        def __init__(self, config: DSoPConfig, num_classes: int) -> None:
            super().__init__(_build(name, build, num_classes), taps, config, image_size)
            if self.num_classes != num_classes:
                raise ConfigError(
                    f"{name}: returns {self.num_classes} logits for {num_classes} classes"
                    "; use the number that the builder receives"
                )

        def inference_model(self) -> Backbone:
            return plain(self.config, self.num_classes)

    kinds: tuple[type[Classifier], type[StrictModel]] = (Branched, DSoPConfig) if taps else (Plain, NoOptions)
    REGISTERED[name] = Entry(*kinds, {}, "registered in this process", image_size, feature_maps=False)


def _build(name: str, build: Callable[[int], nn.Module], num_classes: int) -> nn.Module:
    try:
        network = build(num_classes)
    except Exception as error:  # the user's code
        raise ConfigError(f"{name}: cannot be built ({first_line(error)}); correct the builder") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name}: its builder returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def find_taps(network: nn.Module, taps: Sequence[str], image_size: int) -> tuple[dict[str, int], int]:
    """Run *network* on one black image to find the channels at *taps* and the number of classes.

    The taps are returned in the order of computation. Train and eval modes are restored afterwards. Raises
    `ConfigError` as `dsop` does.
    """
    if not isinstance(network, nn.Module):
        raise ConfigError(f"dsop: the network is a {type(network).__name__}, not a torch.nn.Module")
    names = dict(network.named_modules())
    parts = ", ".join(name for name, _ in network.named_children())
    if not taps or isinstance(taps, str):
        raise ConfigError(f"taps: give a list of names of modules; the network has {parts}")
    for tap in taps:
        if tap not in names or not tap:
            raise ConfigError(f"taps: the network has no module {tap!r}; it has {parts}")
    with evaluated(network, image_size) as images:
        logits, outputs = run_tapped(network, network, images, taps)
    for tap in taps:
        shape = tuple(outputs[tap].shape) if isinstance(outputs.get(tap), Tensor) else ()
        if len(shape) != 4 or shape[2] != shape[3]:
            given = shape or "no tensor"
            raise ConfigError(
                f"taps: {tap} gives {given}, not a feature map (batch, channels, side, side)"
                "; choose another module"
            )
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"dsop: the network returns {given} for one image, not (1, classes)")
    return {tap: outputs[tap].shape[1] for tap in outputs}, logits.shape[1]


@contextmanager
def evaluated(network: nn.Module, image_size: int) -> Iterator[Tensor]:
    """Put *network* into eval mode and yield one black image (1, 3, side, side) on its device.

    Train and eval modes are restored afterwards. Raises `ConfigError` if the network cannot run.
    """
    modes = {part: part.training for part in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), None)
    network.eval()
    try:
        with torch.no_grad():
            yield torch.zeros(1, 3, image_size, image_size, device=device)
    except Exception as error:  # the user's code
        raise ConfigError(
            f"taps: the network fails for an image of 3 x {image_size} x {image_size} "
            f"({first_line(error)}); give the image_size that it accepts"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def last_map(network: nn.Module, image_size: int) -> str:
    """Find the module of *network* that computes the last feature map (1, C, side, side), side > 1.

    Of modules that return the same tensor, it is the outermost one. Raises `ConfigError` if there is none, or
    if tokens (1, N, C) follow: the map may then be the weights of an attention.
    """
    names = [name for name, _ in network.named_modules() if name]
    with evaluated(network, image_size) as images:
        _, outputs = run_tapped(network, network, images, names)
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(output.shape) if isinstance(output, Tensor) else () for name, output in outputs.items()
    }
    for name, shape in reversed(shapes.items()):
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            return name
        if len(shape) == 3:
            break
    raise ConfigError(
        "head.taps: the network does not end in a feature map; name modules that return one, or set "
        "head.kind=gap"
    )
