"""Networks of timm: `timm:NAME`; `dsop-timm:NAME` has DSoP's branches (`dsop_networks`).

NAME is timm's own, with or without a tag (`resnet18.a1_in1k`). The network is built by
`timm.create_model(pretrained=False)`; timm is imported only when such a network is requested.
The inference model is timm's network with timm's key names, so timm's weight files fit.

Taps are the stages in timm's `feature_info` from stride 4 on: what the papers call conv2_x to
conv5_x. timm's `forward_intermediates` returns their maps; in a transformer, these are the
patch tokens of a block after the network's last norm.
"""

import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.base.config import Count, StrictModel
from sopdeploy.base.environment import import_optional
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.errors import ConfigError, MissingPackageError, first_line
from sopdeploy.layers.residual import BasicBlock, Bottleneck
from sopdeploy.models.backbones.base import Backbone
from sopdeploy.models.backbones.efficientnet import mbconv
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import Entry, with_config

FIRST_STRIDE = 4  # stages of smaller stride belong to the stem


class TimmConfig(StrictModel):
    """`backbone` is the network's name in timm, such as `convnext_tiny` or `resnet18.a1_in1k`.

    Two options of timm's ResNets: `attn_layer` is timm's name of an attention in every block,
    such as "se" or "cbam"; `output_stride` 8 or 16 dilates the last stages instead of
    striding. `image_size` is the side of the images of a network with
    position embeddings, by default that of timm's weights.
    """

    backbone: Annotated[str, pydantic.Field(min_length=1)]
    attn_layer: str | None = None
    output_stride: Literal[8, 16, 32] = 32
    image_size: Count | None = None

    def build(self, **sizes: Any) -> nn.Module:
        """Build timm's network with fresh weights; *sizes* are more arguments of `timm.create_model`.

        Raises `ConfigError` if the network does not have an option.
        """
        set_options = self.model_dump(
            include={"attn_layer", "output_stride", "image_size"}, exclude_defaults=True
        )

        # Timm takes each option under a name of its own, and networks without it raise a
        # TypeError.
        options: dict[str, Any] = {}
        if self.output_stride != 32:
            options["output_stride"] = self.output_stride
        if self.attn_layer is not None:
            options["block_args"] = {"attn_layer": self.attn_layer}
        if self.image_size is not None:
            options["img_size"] = self.image_size

        try:
            network: nn.Module = import_timm(self.backbone).create_model(
                self.backbone, **options, **sizes
            )
        except (AssertionError, NotImplementedError, TypeError) as error:
            if not options:  # timm cannot build its own network
                raise
            raise ConfigError(
                f"timm:{self.backbone}: timm cannot build it with {', '.join(set_options)} "
                f"({first_line(error)}); choose other values"
            ) from error

        return network


def import_timm(name: str) -> Any:
    """Import `timm`; raises `MissingPackageError`, or `ConfigError` if it has no network *name*."""
    timm = import_optional("timm", "timm", ".[train]", MissingPackageError, f"timm:{name}")

    names = [*timm.list_models(), *timm.list_pretrained()]
    if name not in names:
        hint = did_you_mean(name, names, "timm.list_models() lists them")
        raise ConfigError(f"timm:{name}: timm {timm.__version__} has no such network; {hint}")
    return timm


class TimmMaps(NamedTuple):
    """The feature maps of a network of timm.

    `taps` are the channels of the stages of stride 4 or more. `last` are those of the map before the
    pooling, if a convolution after the last stage changes their number; otherwise it is None.
    """

    taps: Mapping[str, int]
    last: int | None


@cache
def find_timm_maps(name: str) -> TimmMaps:
    """Find the feature maps of timm's network *name*.

    There are none if stages have no name or feature map, or if the code depends on the values of
    pixels.
    """
    # Run the network without memory for its numbers.
    timm = import_timm(name)
    side = timm.get_pretrained_cfg(name).input_size[-1]

    with torch.device("meta"):
        network = timm.create_model(name).eval()
        stages = list(getattr(network, "feature_info", ()))
        if not stages or not hasattr(network, "forward_intermediates"):
            return TimmMaps({}, None)

        images = torch.empty(1, 3, side, side)
        try:
            maps = network.forward_intermediates(images, intermediates_only=True)
            last = network.forward_features(images)
        except RuntimeError:  # it reads values, which `meta` does not have
            return TimmMaps({}, None)

    # Only networks whose maps are what timm's description says.
    channels = [m.shape[1] if m.dim() == 4 else None for m in maps]  # None: tokens
    if channels != [stage["num_chs"] for stage in stages]:
        return TimmMaps({}, None)
    taps = {
        stage["module"]: stage["num_chs"]
        for stage in stages
        if stage["reduction"] >= FIRST_STRIDE
    }
    # Maps with channels last, as of Swin, have another shape for another reason.
    is_wider = last.dim() == 4 and last.shape[2:] == maps[-1].shape[2:]
    return TimmMaps(taps, last.shape[1] if is_wider and last.shape[1] != channels[-1] else None)


def nearest_block(
    network: nn.Module, taps: Collection[str]
) -> Callable[[int, int, int], nn.Module]:
    """Select the kind of residual block that is most like those of *network*'s stages.

    It is `mbconv` if the stages have depthwise convolutions, `Bottleneck` if they have 1x1
    convolutions of stride 1 (shortcuts mostly have stride 2), and otherwise `BasicBlock`.
    """
    parts = [part for tap in taps for part in network.get_submodule(tap).modules()]
    convolutions = [part for part in parts if isinstance(part, nn.Conv2d)]

    if any(part.groups > 1 and part.groups == part.in_channels for part in convolutions):
        return mbconv
    if any(part.kernel_size == (1, 1) and part.stride == (1, 1) for part in convolutions):
        return Bottleneck
    return BasicBlock


class TimmBackbone(Backbone):
    """A network of timm, with taps if it has feature maps or patch tokens.

    It shares its dicts of modules, parameters and buffers with timm's own module, so that
    state-dict keys are timm's: a child would add a prefix. Moving, loading or saving this
    module does the same to timm's.
    """

    config: TimmConfig

    def __init__(self, config: TimmConfig, num_classes: int) -> None:
        # The network's own parts become parts of this one, so that names in weight files fit.
        super().__init__(config, num_classes)
        network: Any = config.build(num_classes=num_classes)
        self._modules = network._modules
        self._parameters = network._parameters
        self._buffers = network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        # It is in a tuple, because an attribute that is a module becomes a child.
        self.wrapped = (network,)

        self.maps_of_timm = find_timm_maps(config.backbone)
        self.tap_channels = dict(self.maps_of_timm.taps)
        self.head_channels: int = getattr(network, "head_hidden_size", network.num_features)
        published = network.pretrained_cfg
        self.fixed_size: int | None = None
        if published["fixed_input_size"]:
            self.fixed_size = config.image_size or published["input_size"][-1]

    def fit_positions(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Interpolate the position embeddings in *tensors*, if they are those of another image size."""
        # Only a square grid of another size can be interpolated.
        own = getattr(self.timm_network, "pos_embed", None)
        stored = tensors.get("pos_embed")
        if own is None or stored is None or stored.ndim != 3 or stored.shape == own.shape:
            return tensors
        prefix = self._num_prefix_positions()
        if math.isqrt(stored.shape[1] - prefix) ** 2 != stored.shape[1] - prefix:
            return tensors  # of no square image; the shapes will be compared

        resample = import_optional("timm.layers", "timm", ".[train]", MissingPackageError)
        grid = list(self.timm_network.patch_embed.grid_size)
        fitted = resample.resample_abs_pos_embed(
            stored, new_size=grid, num_prefix_tokens=prefix
        )
        return {**tensors, "pos_embed": fitted}

    def size_of(self, tensors: Mapping[str, Tensor]) -> int | None:
        """Return the image size of the position embeddings in *tensors*.

        None if there are none, if they are of no square image, or if the network takes any size.
        """
        stored = tensors.get("pos_embed")
        patches = getattr(self.timm_network, "patch_embed", None)
        if self.fixed_size is None or stored is None or stored.ndim != 3 or patches is None:
            return None

        count = stored.shape[1] - self._num_prefix_positions()
        side: int = math.isqrt(count) * patches.patch_size[0]
        return side if math.isqrt(count) ** 2 == count else None

    def _num_prefix_positions(self) -> int:
        """Return the number of position embeddings of tokens that are not patches."""
        network = self.timm_network
        return (
            0
            if getattr(network, "no_embed_class", False)
            else getattr(network, "num_prefix_tokens", 1)
        )

    @property
    def timm_network(self) -> Any:
        """timm's own module."""
        return self.wrapped[0]

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set training or eval mode, also of timm's own module."""
        self.timm_network.training = mode
        return super().train(mode)

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build the block that `nearest_block` selects."""
        return nearest_block(self.timm_network, self.tap_channels)(
            in_channels, out_channels, stride
        )

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the output of timm's `forward_features`, and the map (B, C, H, W) of every tapped stage.

        Raises `ConfigError` if the network has position embeddings for another image size.
        """
        if self.fixed_size is not None and self.fixed_size != images.shape[-1]:
            raise ConfigError(
                f"timm:{self.config.backbone}: takes images of {self.fixed_size} "
                f"pixels, not of {images.shape[-1]}; set preprocess.crop (and "
                "augment.crop)"
            )

        network = self.timm_network
        if not taps:
            return network.forward_features(images), []

        wanted = [
            number
            for number, stage in enumerate(network.feature_info)
            if stage["module"] in taps
        ]
        # Without a module `norm` there is nothing to apply, and two networks of timm refuse
        # norm=True then.
        with_norm = hasattr(network, "norm")
        return network.forward_intermediates(images, indices=wanted, norm=with_norm)

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits by timm's `forward_head`."""
        return self.timm_network.forward_head(features)

    @property
    def num_features(self) -> int:
        """The length of the vector that timm's classifier reads."""
        return self.head_channels


class PlainTimm(Classifier, TimmBackbone):
    """A network of timm without changes."""

    inference_class = TimmBackbone

    def remove_classifier(self) -> int:
        """Replace timm's classifiers, two in a distilled network; return the length of the vector."""
        self.timm_network.reset_classifier(0)
        return self.head_channels


def timm_entry(family: str, name: str) -> Entry:
    """Build the entry of `timm:NAME` or `dsop-timm:NAME`, with the image size of timm's weights.

    Raises `ConfigError` if timm has no network *name*.
    """
    side = import_timm(name).get_pretrained_cfg(name).input_size[-1]
    defaults = {"backbone": name}
    if family == "timm":
        return Entry(PlainTimm, TimmConfig, defaults, f"timm's {name}", image_size=side)

    # `dsop-timm:NAME`
    return with_config(
        "sopdeploy.models.dsop_networks:DSoPTimm",
        defaults,
        f"DSoP on timm's {name}",
        image_size=side,
    )
