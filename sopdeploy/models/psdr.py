"""PSDR: progressive supervised dimensionality reduction, before second-order pooling that ships.

Paper: DSoP, sections III-B and IV-B, Fig. 3, Table XI. Where iSQRT-COV goes from 2048 channels to 64 in one
step, PSDR takes several: half of them first, then a fraction `decay` of the last step's while that is more
than the target. In training an auxiliary head follows every step but the last; its own DR, covariance root
and linear classifier leave before the network ships. The chain of steps stays, so PSDR is not free:
0.44 to 0.52 GMACs more than one step on ResNet-50-s1 at 224 pixels.

Assumption: the convolutions of the chain have no bias, as in iSQRT-COV's DR.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone, initialise
from sopdeploy.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.errors import ConfigError
from sopdeploy.layers.isqrt_cov import ISqrtCov, dimension_reduction
from sopdeploy.layers.newton_schulz import RootOptions
from sopdeploy.layers.pooling.base import GapConfig, GlobalPooling
from sopdeploy.models.base import Classifier, Entry, TrainingOutput


class PSDRConfig(ResNetConfig, RootOptions):
    """The backbone, the target `width`, and delta, the `decay` of channels from step to step.

    `main_weight` and `aux_weight` are lambda and gamma, the weights of the losses.
    """

    conv5_stride: Literal[1, 2] = 1
    pooling: GapConfig = GapConfig()  # the end of this network is its own
    width: Annotated[int, pydantic.Field(ge=1)] = 64
    decay: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.25
    main_weight: Annotated[float, pydantic.Field(ge=0)] = 1.0
    aux_weight: Annotated[float, pydantic.Field(ge=0)] = 1.0

    def isqrt(self) -> ISqrtCov:
        """Return a new covariance root of the target width."""
        return ISqrtCov(self.width, self.newton_schulz())


def intermediate_widths(channels: int, target: int, decay: float) -> list[int]:
    """Return the channels after each step but the last (Eq. 4): half of them, then *decay* of the last."""
    widths = []
    width = channels // 2
    while width > target:
        widths.append(width)
        width = int(decay * width)
    return widths


class ProgressivePooling(GlobalPooling):
    """Feature map (B, C, H, W) in, triangle (B, d (d + 1) / 2) of its reduced covariance's root out."""

    def __init__(self, channels: int, config: PSDRConfig) -> None:
        super().__init__()
        if config.width >= channels:
            raise ConfigError(f"width: {config.width} is no reduction of {channels} channels; give less")
        self.widths = intermediate_widths(channels, config.width, config.decay)
        inputs, outputs = [channels, *self.widths], [*self.widths, config.width]
        self.chain = nn.ModuleList(map(dimension_reduction, inputs, outputs))
        self.root = config.isqrt()
        self.out_features = self.root.out_features

    def steps(self, features: Tensor) -> Iterator[Tensor]:
        """Yield the feature map after every step of the chain."""
        for step in self.chain:
            features = step(features)
            yield features

    def forward(self, features: Tensor) -> Tensor:
        """Return the vector of the last step."""
        *_, last = self.steps(features)
        return self.pool(last)

    def pool(self, features: Tensor) -> Tensor:
        """Return the vector of a reduced map."""
        vector: Tensor = self.root(features)
        return vector


class PSDRResNet(Classifier, ResNet):
    """ResNet, progressive reduction, covariance root, one linear layer; nothing is for training only."""

    config: PSDRConfig
    pooling: ProgressivePooling

    def __init__(self, config: PSDRConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.pooling = ProgressivePooling(list(self.tap_channels.values())[-1], config)
        self.fc = self.pooling.classifier(num_classes)
        initialise(self.pooling)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of second-order pooled features."""
        logits: Tensor = self.fc(self.pooling(features))
        return logits

    def inference_model(self) -> Backbone:
        """Return the network with its chain, without auxiliary heads."""
        return PSDRResNet(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return the length of the triangle."""
        return self.pooling.out_features


class SupervisedPSDRResNet(PSDRResNet):
    """The same with an auxiliary head after every step but the last, for training only."""

    training_only = ("auxiliary",)

    def __init__(self, config: PSDRConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.auxiliary = nn.ModuleDict(
            {f"step{n}": self.make_head(width) for n, width in enumerate(self.pooling.widths, start=1)}
        )
        initialise(self.auxiliary)

    def make_head(self, channels: int) -> nn.Sequential:
        """Return DR straight to the target, covariance root and classifier."""
        root = self.config.isqrt()
        fc = nn.Linear(root.out_features, self.num_classes)
        return nn.Sequential(dimension_reduction(channels, self.config.width), root, fc)

    def forward(self, images: Tensor) -> Any:
        """Return (B, classes) logits in eval mode or without heads, else a `TrainingOutput`."""
        if not self.training or "auxiliary" not in self._modules:
            return super().forward(images)
        auxiliary = self.heads(images)
        return TrainingOutput(auxiliary.pop("main"), auxiliary, {})

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of every auxiliary head and of the network itself."""
        if "auxiliary" not in self._modules:
            return super().heads(images)
        *intermediate, last = self.pooling.steps(self.features(images)[0])
        logits = {
            name: head(step) for (name, head), step in zip(self.auxiliary.items(), intermediate, strict=True)
        }
        return {**logits, "main": self.fc(self.pooling.root(last))}

    def loss_weights(self) -> dict[str, float]:
        """Return lambda as `main` and gamma of every head."""
        weights = {f"step{n}": self.config.aux_weight for n in range(1, len(self.pooling.widths) + 1)}
        return {"main": self.config.main_weight, **weights}


def psdr_resnet(network: type[PSDRResNet], summary: str) -> Entry:
    """Return the entry of a ResNet-50 with progressive reduction."""
    return Entry(
        network=network,
        config=PSDRConfig,
        defaults={"depth": 50},
        image_size=224,
        num_classes=1000,
        summary=summary,
    )


ENTRIES = {
    "psdr-resnet50": psdr_resnet(
        SupervisedPSDRResNet, "ResNet-50 before PSDR and iSQRT-COV; its auxiliary heads are detached"
    ),
    "psdr-resnet50-no-aux": psdr_resnet(
        PSDRResNet, "ResNet-50 before progressive reduction and iSQRT-COV, without auxiliary heads"
    ),
}
