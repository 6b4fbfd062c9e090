"""Backbone interface: computes class logits, and the feature maps of its stages on request."""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sopdeploy.base.config import StrictModel
from sopdeploy.layers.pooling.base import PoolingConfig


class Backbone(nn.Module):
    """Base class of networks whose intermediate feature maps can be tapped.

    Attributes:
        tap_channels: Maps the name of every tap (`layer2.0` is the output of the first block of the second
            stage) to its number of channels, in the order of computation.
        outputs: Names of the tensors that `outputs_tuple` returns and that are exported, class logits first.
        stem_parts: Names of the parts that run before the stages.
        stage_names: Names of the stages; each is an `nn.Sequential` of blocks.
        classifier_parts: Names of the parts that compute the logits from the last feature map.
    """

    tap_channels: dict[str, int]
    outputs: tuple[str, ...] = ("logits",)
    stem_parts: ClassVar[tuple[str, ...]] = ("conv1", "bn1", "relu")
    stage_names: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")
    classifier_parts: tuple[str, ...] = ("pooling", "fc")
    grad_checkpointing: bool = (
        False  # whether training computes the maps of blocks again to save memory
    )

    def __init__(self, config: StrictModel, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.tap_channels = {}

    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build a block of the backbone's own kind, for a stage or a branch."""
        raise NotImplementedError(f"{type(self).__name__} must define branch_block for DSoP")

    def feature_maps(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the last feature map (B, C, h, w) and those of *taps*, in the order of computation."""
        x = images
        for part in self.stem_parts:
            x = self.get_submodule(part)(x)

        tapped = []
        for stage in self.stage_names:
            for position, block in enumerate(self.get_submodule(stage).children()):
                if self.grad_checkpointing and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
                if f"{stage}.{position}" in taps:
                    tapped.append(x)

        return x, tapped

    def classify(self, features: Tensor) -> Tensor:
        """Compute (B, classes) logits from the last feature map (B, C, h, w)."""
        x = features
        for part in self.classifier_parts:
            x = self.get_submodule(part)(x)
        return x

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) float logits of normalized (B, 3, H, W) images."""
        return self.classify(self.feature_maps(images)[0])

    def outputs_tuple(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the exported outputs in eval mode, one tensor per name in `outputs`."""
        return (self(images),)

    @property
    def num_features(self) -> int:
        """The length of the vector that the classifier reads."""
        classifier = self.get_submodule(self.classifier_parts[-1])
        return next(
            part.in_features for part in classifier.modules() if isinstance(part, nn.Linear)
        )

    def add_stages(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        """Add one stage for each of `stage_names`, with its number of channels and of blocks, and its stride.

        *channels* is the number before the first stage. Only the first block of a stage has the
        stride. The output of every block can be tapped.
        """
        for name, width, count, stride in zip(
            self.stage_names, widths, blocks, strides, strict=True
        ):
            first = self.branch_block(channels, width, stride)
            rest = [self.branch_block(width, width, 1) for _ in range(count - 1)]

            self.add_module(name, nn.Sequential(first, *rest))
            self.tap_channels |= {f"{name}.{index}": width for index in range(count)}
            channels = width

    def add_classifier(self, config: PoolingConfig) -> None:
        """Add the global pooling of the last stage's map, and the classifier of its vector."""
        *_, channels = self.tap_channels.values()  # of the last block
        pooling = config.build(channels)
        self.pooling: nn.Module = pooling
        self.fc = nn.Linear(pooling.out_features, self.num_classes)


def initialize(network: nn.Module) -> None:
    """Initialize convolutions by Kaiming's normal distribution (fan out), batch norms to weight 1 and bias 0.

    The fan out of a depthwise convolution with a kernel k x k is k^2, as the released code of
    EfficientNet counts. torch's fan out, C k^2, gives smaller weights. With these, activations
    vanish in eval mode until the running statistics of the batch norms have converged: all
    images then have equal logits. Modules on the `meta` device are skipped, because their
    weights have no values.
    """
    for module in network.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue

        if isinstance(module, nn.Conv2d):
            is_depthwise = module.groups == module.in_channels == module.out_channels
            # For a depthwise convolution, torch's fan in is k^2.
            mode: Literal["fan_in", "fan_out"] = "fan_in" if is_depthwise else "fan_out"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
