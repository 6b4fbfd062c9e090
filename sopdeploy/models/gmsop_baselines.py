"""Networks that the GM-SOP paper compares with: one pooling, the mean of K poolings, NetVLAD.

Paper: Wang et al., GM-SOP (NeurIPS 2018), section 3.1 and Tables 2 and 3. ResNet-Xd is one 1x1 convolution
to X channels before the average; SR-SOP pools the 128 channels directly; parametric SR-SOP pools after two
1x1 convolutions; Ave-GAP-K and Ave-SOP-K average K components without a gate.

Assumption, because the paper does not say: the batch norm and dropout after the pooling, which section 2.3
describes for the mixture, are also used with the averages of K, but not with single poolings (the published
counts of ResNet-Xd and SR-SOP do not include them). The README of the released code prints 0.9M parameters
for ResNet-18; the network has 829,192.
"""

from typing import Any, Literal

import pydantic
from torch import Tensor

from sopdeploy.backbones.resnet import LowResolutionResNet, LowResolutionResNetConfig
from sopdeploy.config import Count, FractionBelowOne
from sopdeploy.layers.mixture import Components, Convolutions, FusionHead
from sopdeploy.layers.newton_schulz import NewtonSchulzOptions
from sopdeploy.layers.pooling.codebook import NetVLADConfig
from sopdeploy.models.base import Classifier, Entry


class AveragedResNetConfig(LowResolutionResNetConfig, NewtonSchulzOptions):
    """K = `components` poolings of one kind, averaged; 1 is a single pooling.

    `component_widths` are the channels of a component's 1x1 convolutions; plain GAP and SR-SOP have none.
    """

    component: Literal["gap", "sop"] = "gap"
    components: Count = 1
    component_widths: tuple[Count, ...] = ()
    fusion_norm: bool = False
    dropout: FractionBelowOne = 0.0

    @pydantic.model_validator(mode="after")
    def _components_differ(self) -> "AveragedResNetConfig":
        if self.components > 1 and not self.component_widths:
            raise ValueError("components > 1 needs component_widths; without them all components are equal")
        return self


class AveragedResNet(Classifier, LowResolutionResNet):
    """Classifier of the mean of K poolings of the last feature map."""

    classifier_parts = ("mixture", "head")
    config: AveragedResNetConfig

    def __init__(self, config: AveragedResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.mixture = Components(
            config.component,
            self.channels,
            Convolutions(config.component_widths),
            components=config.components,
            counted=config.components,
            root=config.newton_schulz(),
        )
        self.head = FusionHead(
            self.mixture.out_features, num_classes, norm=config.fusion_norm, dropout=config.dropout
        )

    def classify(self, features: Tensor) -> Tensor:
        """Compute (B, classes) logits from the last feature map (B, C, h, w)."""
        logits: Tensor = self.head(self.mixture(features).mean(dim=1))
        return logits


class NetVLADResNetConfig(LowResolutionResNetConfig):
    """`words` is the number of words of the codebook."""

    words: Count = 64


class NetVLADResNet(Classifier, LowResolutionResNet):
    """Classifier of the NetVLAD vector of the last feature map."""

    classifier_parts = ("pooling", "head")
    config: NetVLADResNetConfig

    def __init__(self, config: NetVLADResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        # centers with small weights in the assignment (assumption: the paper does not say)
        self.pooling = NetVLADConfig(words=config.words, alpha=0.5, centres="normal").build(self.channels)
        self.head = FusionHead(self.pooling.out_features, num_classes, norm=False, dropout=0.0)


_BLOCKS: dict[int, dict[str, int]] = {18: {}, 50: {"blocks_per_stage": 6}}
PARAMETRIC: dict[str, Any] = {"component": "sop", "component_widths": (256, 128)}
AVERAGE_OF_16: dict[str, Any] = {"components": 16, "fusion_norm": True, "dropout": 0.2}

_AVERAGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"resnet{depth}-64px": (f"plain ResNet-{depth}", _BLOCKS[depth]) for depth in _BLOCKS},
    **{f"wrn36-{k}": (f"plain WRN-36-{k}", {"blocks_per_stage": 4, "widen": k}) for k in (1, 2, 5)},
    **{
        f"resnet{depth}-{width}d": (
            f"ResNet-{depth}-{width}d",
            {**_BLOCKS[depth], "component_widths": (width,)},
        )
        for depth in _BLOCKS
        for width in (512, 8256)
    },
    "srsop-resnet18": ("SR-SOP on ResNet-18", {"component": "sop"}),
    "parametric-srsop-resnet18": ("parametric SR-SOP on ResNet-18", PARAMETRIC),
    "avegap-16-resnet18": ("Ave-GAP-16 on ResNet-18", {**AVERAGE_OF_16, "component_widths": (512,)}),
    "avesop-16-resnet18": ("Ave-SOP-16 on ResNet-18", {**AVERAGE_OF_16, **PARAMETRIC}),
}
ENTRIES = {
    **{
        name: Entry(
            AveragedResNet, AveragedResNetConfig, defaults, f"{title} for 64-pixel images", image_size=64
        )
        for name, (title, defaults) in _AVERAGED.items()
    },
    "netvlad-64-resnet18": Entry(
        NetVLADResNet,
        NetVLADResNetConfig,
        {},
        "NetVLAD of 64 words on ResNet-18 for 64-pixel images",
        image_size=64,
    ),
}
