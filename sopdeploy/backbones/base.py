"""What every backbone is: images in, feature maps by stage on the way, class logits out."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from sopdeploy.config import StrictModel


class Backbone(nn.Module, ABC):
    """A network that can be tapped.

    `tap_channels` maps the name of every place where a branch may start (`layer2.0` is the output of
    the first block of the second stage) to the number of channels there, in the order of computing.
    `outputs` names what `answer` gives: the tensors that ship, class logits first.
    """

    tap_channels: dict[str, int]
    outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, config: StrictModel, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    @abstractmethod
    def features(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the last feature map (B, C, h, w) and those of *taps*, in the order of computing."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Return (B, classes) logits of the last feature map."""

    @abstractmethod
    def branch_block(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Return a new block of the backbone's own kind, for a branch."""

    def forward(self, images: Tensor) -> Any:
        """Return (B, classes) float logits of normalised (B, 3, H, W) images."""
        return self.classify(self.features(images)[0])

    def outputs_tuple(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what ships computes, one tensor per name in `outputs`; in eval mode."""
        return (self(images),)


def run_stages(
    network: nn.Module, stages: Collection[str], x: Tensor, taps: Collection[str]
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks of *network*'s *stages* on *x*; collect the output of each block named in *taps*."""
    tapped = []
    for stage in stages:
        for position, block in enumerate(network.get_submodule(stage).children()):
            x = block(x)
            if f"{stage}.{position}" in taps:
                tapped.append(x)
    return x, tapped


def initialise(network: nn.Module) -> None:
    """Give *network* the usual start: Kaiming (fan out) convolutions, batch norms at 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
