"""GM-SOP's gate and experts on small backbones, with one option per experiment.

The layers are those of `sopdeploy.models.gmsop`, whose networks are ResNets with four stages for 64-pixel
images. `gate="none"` averages all experts (Ave-SOP-N); with one expert this is parametric SR-SOP.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gain.networks import TextureNet, TextureNetConfig
from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.cifar_resnet import SmallResNet, SmallResNetConfig
from sopdeploy.config import StrictModel
from sopdeploy.layers.mixture.components import Components, Convolutions, FusionHead
from sopdeploy.layers.mixture.gate import GateNoise, SparseGate, balance_loss, keep_largest
from sopdeploy.models.base import Classifier, TrainingOutput
from sopdeploy.models.gmsop import GMSOPConfig, make_gate
from sopdeploy_export.proof.networks import detach


class MixtureConfig(StrictModel):
    """Options of a mixture.

    `expert_norm` adds a batch norm between an expert's last convolution and its ReLU, `head_norm` one for
    the mixed vector (as in the paper). With the initial gate weights of the released code (`constant`) all
    experts start with equal weights; with `gate_start="random"` they differ. `noise` is gamma in Eq. (2).
    """

    components: int = 8
    chosen: int = 2
    widths: tuple[int, ...] = (32,)
    gate: Literal["sparse", "none"] = "sparse"
    gate_widths: tuple[int, ...] = (32,)
    gate_kind: Literal["sop", "gap"] = "sop"
    gate_start: Literal["constant", "random"] = "constant"
    noise: Literal["image", "component", "none"] = "image"
    balance: float = 100.0
    expert_norm: bool = False
    head_norm: bool = True
    dropout: float = 0.0


class ExpertNorm(nn.Module):
    """Batch norm for each expert's channels, (B N, d, H, W) to the same shape, for all experts and images."""

    def __init__(self, components: int, width: int) -> None:
        super().__init__()
        self.components = components
        self.bn = nn.BatchNorm2d(components * width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each expert's feature maps."""
        grouped = x.unflatten(0, (-1, self.components)).flatten(start_dim=1, end_dim=2)
        normal: Tensor = self.bn(grouped)
        return normal.unflatten(1, (self.components, -1)).flatten(end_dim=1)


class Gated(Classifier):
    """Mixin that adds a mixture to the last feature map; list it before the backbone class."""

    mixing: MixtureConfig

    def attach_mixture(self, mixing: MixtureConfig, channels: int) -> None:
        """Replace pooling and classifier by experts, gate and mixture head."""
        self.mixing = mixing
        del self.pooling, self.fc
        as_paper = GMSOPConfig(
            component=mixing.gate_kind, components=max(2, mixing.components), gate_widths=mixing.gate_widths,
            gate_norm=True, chosen=mixing.chosen,
        )  # fmt: skip
        self.mixture = Components(
            "sop", channels, Convolutions(mixing.widths), components=mixing.components, counted=mixing.chosen,
            root=as_paper.newton_schulz(),
        )  # fmt: skip
        if mixing.expert_norm:
            self.mixture.rectified = False
            norm = ExpertNorm(mixing.components, mixing.widths[-1])
            self.mixture.after = nn.Sequential(norm, nn.ReLU(), self.mixture.after)
        self.head = FusionHead(
            self.mixture.out_features, self.num_classes, norm=mixing.head_norm, dropout=mixing.dropout
        )
        if mixing.gate == "sparse":
            self.gate = self.make_gate(as_paper, channels)
            self.training_only = ("gate.noise",)

    def make_gate(self, as_paper: GMSOPConfig, channels: int) -> SparseGate:
        """Create the gate with its noise."""
        gate = make_gate(as_paper, channels)
        features = gate.weight.shape[1]
        if self.mixing.gate_start == "random":
            nn.init.normal_(gate.weight, std=features**-0.5)
        per = "component" if self.mixing.noise == "component" else "image"
        gate.add_module("noise", GateNoise(features, self.mixing.components, per))
        return gate

    def weights(self, features: Tensor) -> Tensor:
        """Compute the weights of the experts, (B, N): equal, or those of the gate, with noise in training."""
        if self.mixing.gate == "none":
            count = self.mixing.components
            return torch.full((len(features), count), 1.0 / count)
        feature_BD = self.gate.feature(features)
        logits = self.gate.logits(feature_BD)
        if self.training and self.mixing.noise != "none":
            logits = logits + self.gate.get_submodule("noise")(feature_BD)
        return keep_largest(logits, self.mixing.chosen)

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits from the last feature maps."""
        logits: Tensor = self.head(self.mixture(features, self.weights(features)))
        return logits

    def forward(self, images: Tensor) -> Any:
        """Compute logits; in train mode with a gate, also the balance loss."""
        features, _ = self.feature_maps(images)
        if not self.training or self.mixing.gate == "none":
            return self.classify(features)
        weights_BN = self.weights(features)
        # A batch norm needs all images, so routing is not possible with it.
        mix = self.mixture if self.mixing.expert_norm else self.mixture.routed_sum
        logits: Tensor = self.head(mix(features, weights_BN))
        return TrainingOutput(logits, {}, {"balance": balance_loss(weights_BN, self.mixing.balance)})

    def inference_model(self) -> Backbone:
        """Create the network without noise."""
        network = type(self)(self.config, self.num_classes)
        return detach(network) if network.training_only else network


class GatedTextureNetConfig(TextureNetConfig):
    """Options of the texture network and of its mixture."""

    mixture: MixtureConfig = MixtureConfig()


class GatedTextureNet(Gated, TextureNet):
    """The texture network with a mixture after its convolution."""

    config: GatedTextureNetConfig

    def __init__(self, config: GatedTextureNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_mixture(config.mixture, self.channels)


class GatedSmallResNetConfig(SmallResNetConfig):
    """Options of the ResNet and of its mixture."""

    mixture: MixtureConfig = MixtureConfig()


class GatedSmallResNet(Gated, SmallResNet):
    """A small ResNet with a mixture after its last stage."""

    config: GatedSmallResNetConfig

    def __init__(self, config: GatedSmallResNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_mixture(config.mixture, self.fc.in_features)
