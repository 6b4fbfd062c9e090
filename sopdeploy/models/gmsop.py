"""GM-SOP: a gate selects K of N second-order poolings for each image; their weighted sum is classified.

Paper: Wang et al., "Global Gated Mixture of Second-order Pooling for Improving Deep
Convolutional Neural Networks" (NeurIPS 2018), section 2. GM-GAP has average poolings instead.
The one-layer SG-MoE of Table 3 has linear experts and a gate on the averaged features.

The inference model of `GMSOPResNet` is `GatedResNet`; `GMSOP` adds the training-only parts, the gate's
noise (Wn of Eq. 2) and the balance loss (Eq. 4, divided by the number of images of a step as in
the released trainer, whose cross entropy is a sum over the batch). Multiply-adds count K of N
components and not the gate's Wg f.

Where paper and released code differ the default is the paper's: 5 Newton-Schulz iterations
(code 3), stride 2 in conv5_x (code: 1 with second-order pooling), dropout 0.2 (code 0.4 for
GM-SOP on WRN), noise per component (code: per image). The gate's prediction layers "share the
same architecture" with the components (section 2.3), which have no batch norm; the code's have
one (`gate_norm`), and 256, 128 channels for GM-GAP on ResNet-18 (`gate_widths`). Both give the
parameters that Table 3 prints, 2.3M, 8.7M and 11.9M, so the text decides. The README of the
released code prints 15.7M for GM-SOP on WRN-36-2; the code builds 17.8M.

The experts of the one-layer SG-MoE are "fully-connected layers" of 128 x 512 (section 3.3), so
they have biases. Assumption, because the paper does not say: its sum is classified directly,
without the batch norm and dropout that section 2.3 adds to GM-SOP; with or without them the
parameters are the printed 2.3M.

The networks that the paper compares with (section 3.1, Tables 2 and 3) are one pooling, the
mean of K poolings, and NetVLAD. ResNet-Xd is one 1x1 convolution to X channels before the
average; SR-SOP pools the 128 channels directly; parametric SR-SOP pools after two 1x1
convolutions; Ave-GAP-K and Ave-SOP-K average K components without a gate. Assumption, because
the paper does not say: the batch norm and dropout after the pooling, which section 2.3
describes for the mixture, are also used with the averages of K, but not with single poolings
(the published counts of ResNet-Xd and SR-SOP do not include them). The README of the released
code prints 0.9M parameters for ResNet-18; the network has 829,192.

Letters: B images, N components, K chosen ones, C channels, D length of a vector.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.base.config import Count, FractionBelowOne, NonNegative
from sopdeploy.errors import ConfigError
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import NewtonSchulzOptions
from sopdeploy.layers.mixture import (
    ComponentKind,
    Components,
    FusionHead,
    GateNoise,
    NoisePer,
    SparseGate,
    balance_loss,
    build_pooling,
    softmax_of_largest,
)
from sopdeploy.layers.netvlad import NetVLAD
from sopdeploy.layers.pooling.base import FixedAverage, GapConfig, dimension_reduction
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.backbones.base import Backbone
from sopdeploy.models.backbones.efficientnet import (
    HEAD_CHANNELS,
    EfficientNetLite,
    EfficientNetLiteConfig,
)
from sopdeploy.models.backbones.resnet import (
    LowResolutionResNet,
    LowResolutionResNetConfig,
    initialize_by_fan_in,
)
from sopdeploy.models.base import Classifier, TrainingOutput


class MixtureConfig(NewtonSchulzOptions):
    """The mixture: `chosen` of `components` poolings per image (K of N).

    `component_widths` are the channels of a component's 1x1 convolutions, `gate_widths` those
    of the gate's prediction layers; "none" selects the architecture of a component, as in
    section 2.3. `gate_norm` adds a batch norm to each of them, as in the released code.
    `fusion_norm` is the batch norm of the mixed vector (section 2.3). `noise_per` selects how
    the gate's gamma is drawn: per component of an image, as in SG-MoE, or per image, as in the
    released code. `balance_weight` is alpha.

    In training, each component is evaluated on its images only. Eval mode evaluates all
    components on all images, and an exported graph gathers the weights of K components per
    image: no shape depends on the data.
    """

    component: ComponentKind = "sop"
    components: Annotated[int, pydantic.Field(ge=2)] = 16
    chosen: Count = 8
    component_widths: tuple[Count, ...] = pydantic.Field(default=(256, 128), min_length=1)
    gate_widths: Annotated[
        tuple[Count, ...] | None,
        pydantic.BeforeValidator(lambda widths: None if widths == "none" else widths),
    ] = None
    gate_norm: bool = False
    fusion_norm: bool = True
    dropout: FractionBelowOne = 0.2
    noise_per: NoisePer = "component"
    balance_weight: NonNegative = 100.0

    @pydantic.model_validator(mode="after")
    def _chosen_among_components(self) -> "MixtureConfig":
        if self.chosen > self.components:
            raise ValueError(
                f"chosen ({self.chosen}) is more than components ({self.components})"
            )
        return self


class GMSOPResNetConfig(LowResolutionResNetConfig, MixtureConfig):
    """The ResNet for 64-pixel images and the mixture."""


class GMSOPEfficientNetLiteConfig(EfficientNetLiteConfig, MixtureConfig):
    """EfficientNet-Lite and the mixture, of fewer and smaller poolings than in the paper."""

    pooling: FixedAverage = GapConfig()  # fixed: the mixture is the pooling
    components: Annotated[int, pydantic.Field(ge=2)] = 4
    chosen: Count = 2
    component_widths: tuple[Count, ...] = pydantic.Field(default=(128, 64), min_length=1)


class Gated(Backbone, ExportHints):
    """Mixin of inference models: logits and the gate's weights; K of N components are used per image.

    Put it before the backbone in the bases. The backbone has no pooling and no classifier.

    Attributes:
        channels: The channels of the last feature map.
    """

    outputs = ("logits", "gates")
    classifier_parts: tuple[str, ...] = ("gate", "mixture", "head")
    config: Any
    channels: int

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        # The gate has prediction layers, a pooling of the components' kind, Wg and the top K.
        gate_widths = (
            config.component_widths if config.gate_widths is None else config.gate_widths
        )
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((self.channels, *gate_widths)):
            convolution, norm, relu = dimension_reduction(inputs, outputs)
            step = (convolution, norm, relu) if config.gate_norm else (convolution, relu)
            layers.append(nn.Sequential(*step))

        last_width = gate_widths[-1] if gate_widths else self.channels

        pool, length = build_pooling(config.component, last_width, config.root_config())
        self.gate = SparseGate(
            nn.Sequential(*layers, pool), length, config.components, config.chosen
        )
        initialize_by_fan_in(self.gate)

        # The experts, and the classifier of their weighted sum.
        self.mixture = Components(
            config.component,
            self.channels,
            config.component_widths,
            components=config.components,
            evaluated=config.chosen,
            root=config.root_config(),
        )
        self.head = FusionHead(
            self.mixture.out_features,
            num_classes,
            norm=config.fusion_norm,
            dropout=config.dropout,
        )

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) logits of normalized (B, 3, H, W) images."""
        return self.outputs_tuple(images)[0]

    def classify(self, features: Tensor) -> Tensor:
        """Compute (B, classes) logits from the last feature map (B, C, h, w), without noise."""
        return self.mix(features)[0]

    def outputs_tuple(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute logits (B, classes) and the gate's weights (B, N), K of them not 0, without noise."""
        return self.mix(self.feature_maps(images)[0])

    def mix(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what `outputs_tuple` returns from the last feature map (B, C, h, w)."""
        weights_BN = self.gate(features)
        mixed_BD = self.mixture(features, weights_BN, gather=self.is_captured)
        return self.head(mixed_BD), weights_BN


class GatedResNet(Gated, LowResolutionResNet):
    """Inference model on the ResNet for 64-pixel images."""

    config: GMSOPResNetConfig


class _HeadlessLite(EfficientNetLite):
    """EfficientNet-Lite without its pooling and its classifier."""

    channels = HEAD_CHANNELS

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        del self.pooling, self.dropout, self.classifier


class GatedEfficientNetLite(Gated, _HeadlessLite):
    """Inference model on EfficientNet-Lite."""

    config: GMSOPEfficientNetLiteConfig


class GMSOP(Classifier, Gated):
    """Mixin that adds the training-only parts to a network of `Gated`; put it before the network's class."""

    training_only = ("gate.noise",)

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        components, length = self.gate.weight.shape
        self.gate.add_module("noise", GateNoise(length, components, self.config.noise_per))

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) logits in eval mode, a `TrainingOutput` in train mode.

        Raises `ConfigError` in train mode for chosen=1: the softmax of one logit is always 1,
        so the gate has no gradient. An exported network may have chosen=1.
        """
        if not self.training:
            return super().forward(images)

        if self.config.chosen == 1:
            raise ConfigError(
                "chosen: must be at least 2 to train; with 1 the gate has no gradient"
            )

        # Route each image to its experts; the others compute nothing.
        features, weights_BN = self.features_and_noisy_weights(images)
        # On `meta`, weights have no values that could be compared with 0 to route by them.
        mixed_BD = self.mixture(features, weights_BN, route=not features.is_meta)
        logits: Tensor = self.head(mixed_BD)

        # The loss balances the load of the experts.
        balance = balance_loss(weights_BN, self.config.balance_weight, self.batches_per_step)
        counts = (weights_BN > 0).sum(dim=0)
        return TrainingOutput(
            logits, branches={}, penalties={"balance": balance}, component_counts=counts
        )

    def features_and_noisy_weights(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the last feature map (B, C, H, W) and the gate's weights (B, N) with noise."""
        features, _ = self.feature_maps(images)
        feature_BD = self.gate.feature(features)
        noise: Tensor = self.gate.get_submodule("noise")(feature_BD)
        return features, softmax_of_largest(
            self.gate.logits(feature_BD) + noise, self.config.chosen
        )


class GMSOPResNet(GMSOP, GatedResNet):
    """GM-SOP on the paper's ResNet for 64-pixel images."""

    inference_class = GatedResNet


class GMSOPEfficientNetLite(GMSOP, GatedEfficientNetLite):
    """GM-SOP on EfficientNet-Lite, to fine-tune from its ImageNet weights; the paper does not have it."""

    inference_class = GatedEfficientNetLite


class AveragedResNetConfig(LowResolutionResNetConfig, NewtonSchulzOptions):
    """K = `components` poolings of one kind, averaged; 1 is a single pooling.

    `component_widths` are the channels of a component's 1x1 convolutions; plain GAP and SR-SOP
    have none. `pooling` is any global pooling, in the place of the components.
    """

    component: Literal["gap", "sop"] = "gap"
    components: Count = 1
    component_widths: tuple[Count, ...] = ()
    pooling: Pooling | None = None
    fusion_norm: bool = False
    dropout: FractionBelowOne = 0.0

    @pydantic.model_validator(mode="after")
    def _check_components(self) -> "AveragedResNetConfig":
        if self.components > 1 and not self.component_widths:
            raise ValueError(
                "components > 1 needs component_widths; without them all components are equal"
            )

        has_components = self.component != "gap" or self.components > 1 or self.component_widths
        if self.pooling is not None and has_components:
            raise ValueError(
                "pooling is in the place of components; choose resnet18-64px or wrn36-2"
            )
        return self


class AveragedResNet(Classifier, LowResolutionResNet):
    """Classifier of the mean of K poolings of the last feature map."""

    classifier_parts = ("mixture", "head")
    config: AveragedResNetConfig

    def __init__(self, config: AveragedResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)

        # A global pooling takes the place of the mixture.
        if config.pooling is not None:
            self.classifier_parts = ("pooling", "head")  # instead of those of the class
            self.pooling = config.pooling.build(self.channels)
            length = self.pooling.out_features
        else:
            self.mixture = Components(
                config.component,
                self.channels,
                config.component_widths,
                components=config.components,
                evaluated=config.components,  # how many run: all, because no gate selects some
                root=config.root_config(),
            )
            length = self.mixture.out_features

        self.head = FusionHead(
            length, num_classes, norm=config.fusion_norm, dropout=config.dropout
        )

    def classify(self, features: Tensor) -> Tensor:
        """Compute (B, classes) logits from the last feature map (B, C, h, w)."""
        if self.config.pooling is not None:
            return super().classify(features)
        return self.head(self.mixture(features).mean(dim=1))


class NetVLADResNetConfig(LowResolutionResNetConfig):
    """`words` is the number of words of the codebook."""

    words: Count = 64


class NetVLADResNet(Classifier, LowResolutionResNet):
    """Classifier of the NetVLAD vector of the last feature map."""

    classifier_parts = ("pooling", "head")
    config: NetVLADResNetConfig

    def __init__(self, config: NetVLADResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.pooling = NetVLAD(self.channels, config.words)
        self.head = FusionHead(self.pooling.out_features, num_classes, norm=False, dropout=0.0)
