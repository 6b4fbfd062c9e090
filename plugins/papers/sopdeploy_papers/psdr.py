"""PSDR: progressive supervised dimensionality reduction before second-order pooling.

Paper: DSoP, sections III-B and IV-B, Fig. 3, Table XI. iSQRT-COV reduces 2048 channels to 64 in
one step, PSDR in several. The first step halves the channels, each further one multiplies them
by `decay` while the result is above the target. In training, an auxiliary head follows every
step except the last; its dimension reduction (DR), covariance root and linear classifier are
removed before export. The chain of steps stays: it costs 0.44 to 0.52 GMACs more than one step
on ResNet-50-s1 at 224 pixels.

Assumption: the convolutions of the chain have no bias, as in iSQRT-COV's DR.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from sopdeploy.base.config import Count, NonNegative
from sopdeploy.errors import ConfigError
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzOptions
from sopdeploy.layers.pooling.base import (
    FixedAverage,
    GapConfig,
    GlobalPooling,
    dimension_reduction,
)
from sopdeploy.models.backbones.base import initialize
from sopdeploy.models.backbones.resnet import ResNet, ResNetConfig
from sopdeploy.models.base import Classifier


class PSDRConfig(ResNetConfig, NewtonSchulzOptions):
    """The backbone, whose conv5_x keeps its size, the target `width`, and delta, the `decay` of channels.

    `decay` is the ratio of channels from step to step. `main_weight` and `aux_weight` are
    lambda and gamma, the weights of the losses.
    """

    conv5_stride: Literal[1, 2] = 1
    pooling: FixedAverage = GapConfig()  # fixed: this network has its own second-order pooling
    width: Count = 64
    decay: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.25
    main_weight: NonNegative = 1.0
    aux_weight: NonNegative = 1.0


class ProgressivePooling(GlobalPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of their reduced covariance's root."""

    def __init__(self, channels: int, config: PSDRConfig) -> None:
        super().__init__()
        if config.width >= channels:
            raise ConfigError(
                f"width: {config.width} is not smaller than {channels} channels; reduce it"
            )

        self.widths: list[int] = []  # the channels after each step except the last (Eq. 4)
        width = channels // 2
        while width > config.width:
            self.widths.append(width)
            width = int(config.decay * width)

        # The first step halves the channels, the next ones multiply them by `decay`, and the last
        # one leads to `width`.
        inputs = [channels, *self.widths]
        outputs = [*self.widths, config.width]
        self.chain = nn.ModuleList(map(dimension_reduction, inputs, outputs))

        self.root = ISqrtCov(config.width, config.root_config())
        self.out_features = self.root.out_features

    def steps(self, features: Tensor) -> Iterator[Tensor]:
        """Yield the feature map after every step of the chain."""
        for step in self.chain:
            features = step(features)
            yield features

    def forward(self, features: Tensor) -> Tensor:
        """Compute the vector of the last step."""
        *_, last = self.steps(features)
        return self.root(last)


class PSDRResNet(Classifier, ResNet):
    """PSDR on a ResNet without auxiliary heads."""

    config: PSDRConfig
    pooling: ProgressivePooling

    def __init__(self, config: PSDRConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.pooling = ProgressivePooling(list(self.tap_channels.values())[-1], config)
        self.fc = nn.Linear(self.pooling.out_features, self.num_classes)
        initialize(self.pooling)


class SupervisedPSDRResNet(PSDRResNet):
    """`PSDRResNet` with a training-only auxiliary head after every step except the last."""

    training_only = ("auxiliary",)
    inference_class = PSDRResNet

    def __init__(self, config: PSDRConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.auxiliary = nn.ModuleDict()

        for step, channels in enumerate(self.pooling.widths, start=1):
            root = ISqrtCov(config.width, config.root_config())
            fc = nn.Linear(root.out_features, self.num_classes)
            reduction = dimension_reduction(channels, config.width)
            self.auxiliary[f"step{step}"] = nn.Sequential(reduction, root, fc)
        initialize(self.auxiliary)

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits of every auxiliary head and of the network itself."""
        if not self.has_training_heads:
            return super().heads(images)
        *intermediate, last = self.pooling.steps(self.feature_maps(images)[0])
        heads_and_maps = zip(self.auxiliary.items(), intermediate, strict=True)
        logits = {name: head(features) for (name, head), features in heads_and_maps}
        return {**logits, "main": self.fc(self.pooling.root(last))}

    def loss_weights(self) -> dict[str, float]:
        """Return lambda as `main` and gamma of every head."""
        weights = {
            f"step{n}": self.config.aux_weight for n in range(1, len(self.pooling.widths) + 1)
        }
        return {"main": self.config.main_weight, **weights}
