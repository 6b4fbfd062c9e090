"""What the GM-SOP paper compares with: one pooling, the mean of K poolings, NetVLAD.

Paper: Wang et al., GM-SOP (NeurIPS 2018), section 3.1 and Tables 2 and 3. ResNet-Xd is one 1x1 convolution
to X channels before the average; SR-SOP pools the 128 channels as they are; parametric SR-SOP after two
1x1 convolutions; Ave-GAP-K and Ave-SOP-K average K components without a gate.

Assumption, the paper is silent: batch norm and dropout after the pooling, which section 2.3 describes for
the mixture, stand in the averages of K too, and in none of the single poolings (the published counts
of ResNet-Xd and SR-SOP leave no room for them). README's 0.9M for ResNet-18 is not what it builds: 829,192.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from torch import Tensor

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.resnet import LowResolutionResNet, LowResolutionResNetConfig
from sopdeploy.layers.mixture.components import FusionHead, make_components
from sopdeploy.layers.newton_schulz import RootOptions
from sopdeploy.layers.pooling.codebook import NetVLAD
from sopdeploy.models.base import Classifier, Entry

Width = Annotated[int, pydantic.Field(ge=1)]


class AveragedResNetConfig(LowResolutionResNetConfig, RootOptions):
    """K = `components` poolings of one kind, averaged; 1 is a single pooling.

    `component_widths` are a component's 1x1 convolutions, none for GAP and SR-SOP themselves.
    """

    component: Literal["gap", "sop"] = "gap"
    components: Annotated[int, pydantic.Field(ge=1)] = 1
    component_widths: tuple[Width, ...] = ()
    fusion_norm: bool = False
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0

    @pydantic.model_validator(mode="after")
    def _components_differ(self) -> "AveragedResNetConfig":
        if self.components > 1 and not self.component_widths:
            raise ValueError("components without component_widths would all be the same")
        return self


class AveragedResNet(Classifier, LowResolutionResNet):
    """The mean of K poolings of the last feature map, classified."""

    config: AveragedResNetConfig

    def __init__(self, config: AveragedResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.mixture, length = make_components(
            config.component,
            self.channels,
            config.component_widths,
            components=config.components,
            counted=config.components,
            root=config.newton_schulz(),
        )
        self.head = FusionHead(length, num_classes, norm=config.fusion_norm, dropout=config.dropout)

    def classify(self, features: Tensor) -> Tensor:
        """Return (B, classes) logits of the last feature map."""
        logits: Tensor = self.head(self.mixture(features).mean(dim=1))
        return logits

    def inference_model(self) -> Backbone:
        """Return another one."""
        return AveragedResNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return the length of a component's vector."""
        return self.head.fc.in_features


class NetVLADResNetConfig(LowResolutionResNetConfig):
    """The size of the dictionary."""

    words: Annotated[int, pydantic.Field(ge=1)] = 64


class NetVLADResNet(Classifier, LowResolutionResNet):
    """NetVLAD of the last feature map, classified."""

    config: NetVLADResNetConfig

    def __init__(self, config: NetVLADResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.pooling = NetVLAD(self.channels, config.words)
        self.head = FusionHead(self.pooling.out_features, num_classes, norm=False, dropout=0.0)

    def classify(self, features: Tensor) -> Tensor:
        """Return (B, classes) logits of the last feature map."""
        logits: Tensor = self.head(self.pooling(features))
        return logits

    def inference_model(self) -> Backbone:
        """Return another one."""
        return NetVLADResNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return words times channels."""
        return self.pooling.out_features


def averaged(summary: str, defaults: Mapping[str, Any]) -> Entry:
    """Return the entry of an averaged or single pooling."""
    return Entry(
        network=AveragedResNet,
        config=AveragedResNetConfig,
        defaults=defaults,
        image_size=64,
        num_classes=1000,
        summary=f"{summary} for 64-pixel images",
    )


def wide(widen: int) -> Entry:
    """Return the entry of WRN-36-k."""
    return averaged(f"plain WRN-36-{widen}", {"blocks_per_stage": 4, "widen": widen})


RESNET50 = {"blocks_per_stage": 6}
PARAMETRIC = {"component": "sop", "component_widths": (256, 128)}
AVERAGE_OF_16 = {"components": 16, "fusion_norm": True, "dropout": 0.2}

ENTRIES = {
    "resnet18-64px": averaged("plain ResNet-18", {}),
    "resnet50-64px": averaged("plain ResNet-50", RESNET50),
    **{f"wrn36-{widen}": wide(widen) for widen in (1, 2, 5)},
    **{
        f"resnet{depth}-{width}d": averaged(
            f"ResNet-{depth}-{width}d", {**blocks, "component_widths": (width,)}
        )
        for depth, blocks in ((18, {}), (50, RESNET50))
        for width in (512, 8256)
    },
    "srsop-resnet18": averaged("SR-SOP on ResNet-18", {"component": "sop"}),
    "parametric-srsop-resnet18": averaged("parametric SR-SOP on ResNet-18", PARAMETRIC),
    "avegap-16-resnet18": averaged("Ave-GAP-16 on ResNet-18", {**AVERAGE_OF_16, "component_widths": (512,)}),
    "avesop-16-resnet18": averaged("Ave-SOP-16 on ResNet-18", {**AVERAGE_OF_16, **PARAMETRIC}),
    "netvlad-64-resnet18": Entry(
        network=NetVLADResNet,
        config=NetVLADResNetConfig,
        defaults={},
        image_size=64,
        num_classes=1000,
        summary="NetVLAD of 64 words on ResNet-18 for 64-pixel images",
    ),
}
