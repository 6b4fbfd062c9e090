"""Any network of timm as a backbone, with timm's own state-dict keys.

The network is built by `timm.create_model(pretrained=False)`. This is the only module that imports timm, and
only when such a network is requested. Taps are the stages in timm's `feature_info` from stride 4 on: what the
papers call conv2_x to conv5_x. In a transformer, the patch tokens are the feature map; its last tap is the
norm after the blocks.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.config import StrictModel
from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError
from sopdeploy.layers.residual import BasicBlock, Bottleneck, mbconv

FIRST_STRIDE = 4  # stages of smaller stride belong to the stem


class TimmConfig(StrictModel):
    """`backbone` is the network's name in timm, such as `convnext_tiny` or `resnet18.a1_in1k`."""

    backbone: Annotated[str, pydantic.Field(min_length=1)]


def import_timm(name: str) -> Any:
    """Import `timm`; raise `ConfigError` if it is missing or has no network *name* (with its tag, if any)."""
    timm = import_optional("timm", "timm", "sopdeploy[train]", ConfigError, f"timm:{name}")
    names = [*timm.list_models(), *timm.list_pretrained()]
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "one of timm.list_models()"
        raise ConfigError(f"timm:{name}: timm {timm.__version__} has no such network; did you mean {near}?")
    return timm


def timm_image_size(name: str) -> int:
    """Look up the image size in pixels of timm's network *name*; raise `ConfigError` if unknown."""
    size: int = import_timm(name).get_pretrained_cfg(name).input_size[-1]
    return size


class Tap(NamedTuple):
    """A module whose output is a feature map of *channels* channels.

    The output is (B, C, H, W), (B, H, W, C), or (B, N, C): H W patch tokens after `class_tokens` others.
    """

    channels: int
    layout: Literal["NCHW", "NHWC", "tokens"]
    class_tokens: int = 0

    def as_map(self, output: Tensor) -> Tensor:
        """Convert the output of the module to (B, C, H, W)."""
        if self.layout == "NCHW":
            return output
        if self.layout == "tokens":
            patches = output[:, self.class_tokens :]
            side = math.isqrt(patches.shape[1])
            output = patches.reshape(-1, side, side, self.channels)
        return output.permute(0, 3, 1, 2)


@cache
def timm_taps(name: str) -> dict[str, Tap]:
    """Find the taps of timm's network *name*, in the order of computation.

    The result is empty if the network does not name its stages, or if a stage returns neither a feature map
    nor patch tokens.
    """
    timm, side = import_timm(name), timm_image_size(name)
    with torch.device("meta"):
        network = timm.create_model(name).eval()
        channels = {
            stage["module"]: int(stage["num_chs"])
            for stage in getattr(network, "feature_info", [])
            if stage["reduction"] >= FIRST_STRIDE
        }
        if not channels or not channels.keys() <= dict(network.named_modules()).keys():
            return {}
        if isinstance(getattr(network, "norm", None), nn.Module):
            channels.setdefault("norm", network.num_features)
        _, outputs = run_tapped(network, network.forward_features, torch.empty(1, 3, side, side), channels)
    class_tokens = getattr(network, "num_prefix_tokens", 0)
    taps: dict[str, Tap] = {}
    for stage, output in outputs.items():
        tap = _find_layout(output, channels[stage], class_tokens)
        if tap is None:
            return {}
        if stage != "norm" or tap.layout != "NCHW":  # a normalized map is no stage of its own
            taps[stage] = tap
    return taps


def _find_layout(output: Tensor, channels: int, class_tokens: int) -> Tap | None:
    """Find the axes of the feature map of *channels* channels in *output*; `None` if it is no feature map.

    *class_tokens* is the network's number of class and register tokens, which *output* may lack.
    """
    if output.dim() == 4 and output.shape[1] == channels:
        return Tap(channels, "NCHW")
    if output.dim() == 4 and output.shape[3] == channels:
        return Tap(channels, "NHWC")
    if output.dim() == 3 and output.shape[2] == channels:
        for skipped in (class_tokens, 0):
            patches = output.shape[1] - skipped
            if math.isqrt(patches) ** 2 == patches:
                return Tap(channels, "tokens", skipped)
    return None


@contextmanager
def hooked(network: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Add forward hooks to modules of *network*, by name, and remove them afterwards.

    A hook that returns a value replaces the output of its module. Hooks added later run first.
    """
    handles = [
        network.get_submodule(name).register_forward_hook(hook, prepend=True) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_tapped(
    network: nn.Module, run: Callable[[Tensor], Any], images: Tensor, taps: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """Return `run(images)` and the outputs of the modules *taps* of *network*, in order of computation."""
    outputs: dict[str, Any] = {}

    def store(tap: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[tap] = output

    with hooked(network, {tap: partial(store, tap) for tap in taps}):
        return run(images), outputs


def nearest_block(network: nn.Module, taps: Collection[str]) -> Callable[[int, int, int], nn.Module]:
    """Select the kind of residual block that is most like those of *network*'s stages.

    It is `mbconv` if the stages have depthwise convolutions, `Bottleneck` if they have 1x1 convolutions
    besides shortcuts, and otherwise `BasicBlock`.
    """
    parts = [part for tap in taps for part in network.get_submodule(tap).modules()]
    convolutions = [part for part in parts if isinstance(part, nn.Conv2d)]
    if any(part.groups == part.in_channels > 1 for part in convolutions):
        return mbconv
    if any(part.kernel_size == (1, 1) and part.stride == (1, 1) for part in convolutions):
        return Bottleneck
    return BasicBlock


class TimmBackbone(Backbone):
    """A network of timm, with taps if it has feature maps or patch tokens.

    State-dict keys are timm's, without a prefix. It shares its dicts of modules, parameters and buffers with
    timm's own module, which is not a child. Moving, loading or saving this module therefore does the same to
    timm's.
    """

    config: TimmConfig

    def __init__(self, config: TimmConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        network = import_timm(config.backbone).create_model(config.backbone, num_classes=num_classes)
        self._modules, self._parameters = network._modules, network._parameters
        self._buffers = network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.wrapped = (network,)  # a tuple, because a module would become a child
        self.tap_layouts = timm_taps(config.backbone)
        self.tap_channels = {name: tap.channels for name, tap in self.tap_layouts.items()}
        self.head_channels: int = getattr(network, "head_hidden_size", network.num_features)
        published = network.pretrained_cfg
        self.fixed_size: int | None = published["input_size"][-1] if published["fixed_input_size"] else None

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set training or eval mode, also of timm's own module."""
        self.wrapped[0].training = mode
        return super().train(mode)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build the block that `nearest_block` selects."""
        return nearest_block(self.wrapped[0], self.tap_channels)(in_channels, out_channels, stride)

    def feature_maps(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute the output of timm's `forward_features`, and the map (B, C, H, W) of every tapped stage.

        Raises `ConfigError` if the network has position embeddings for another image size.
        """
        if self.fixed_size not in {None, images.shape[-1]}:
            raise ConfigError(
                f"timm:{self.config.backbone}: takes images of {self.fixed_size} pixels, not of "
                f"{images.shape[-1]}; set preprocess.crop (and augment.crop)"
            )
        network = self.wrapped[0]
        last, outputs = run_tapped(network, network.forward_features, images, taps)
        return last, [self.tap_layouts[tap].as_map(output) for tap, output in outputs.items()]

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits by timm's `forward_head`."""
        logits: Tensor = self.wrapped[0].forward_head(features)
        return logits

    def num_features(self) -> int:
        """Return the length of the vector that timm's classifier reads."""
        return self.head_channels

    def averaged_classifier(self) -> nn.Linear | None:
        """Return the linear layer if the head is only average pooling and this layer; otherwise None."""
        network = self.wrapped[0]
        pooling, last = getattr(network, "global_pool", None), network.get_classifier()
        averages = getattr(pooling, "pool_type", "") == "avg"
        exact = averages and network.num_features == network.head_hidden_size
        return last if exact and isinstance(last, nn.Linear) else None
