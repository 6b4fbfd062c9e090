"""Networks of timm, plain (`timm:NAME`) and with DSoP's branches (`dsop-timm:NAME`).

NAME is timm's own. The inference model is timm's network with timm's key names, so timm's weight files fit.
"""

from torch import nn

from sopdeploy.backbones.timm_backbone import TimmBackbone, TimmConfig, timm_image_size
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches


class PlainTimm(Classifier, TimmBackbone):
    """A network of timm without changes."""

    inference_class = TimmBackbone

    def num_features(self) -> int:
        """Return the number of channels that the classifier reads."""
        return self.head_channels()


class DSoPTimmConfig(TimmConfig, DSoPConfig):
    """A network of timm with branches."""


class DSoPTimm(DSoP, TimmBackbone):
    """DSoP on a network of timm: a branch after every stage from stride 4 on, as on ResNet-18.

    Assumptions, because the paper does not cover these networks: a branch has two blocks of the kind nearest
    to timm's, then batch norm and ReLU, because many of timm's stages end without either; covariances of at
    most 256 channels; all losses have the same weight.
    """

    inference_class = TimmBackbone
    inference_config = TimmConfig
    config: DSoPTimmConfig

    def paper_branches(self) -> PaperBranches:
        """Return two blocks and at most 256 channels for every stage."""
        stages = len(self.tap_channels)
        return PaperBranches(
            blocks=(2,) * stages, widths=(256,) * stages, weights=(1.0,) * stages, strides=(1,) * stages
        )

    def tap_stages(self) -> dict[str, list[str]]:
        """Return every stage with its only tap, itself."""
        return {tap: [tap] for tap in self.tap_channels}

    def branch_ending(self, channels: int, /) -> nn.Module:
        """Build batch norm and ReLU."""
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def num_features(self) -> int:
        """Return the number of channels that the classifier reads."""
        return self.head_channels()


def _entry(network: type[Classifier], config: type[TimmConfig], name: str, summary: str) -> Entry:
    """Build an entry with the image size of timm's weights; raise `ConfigError` if unknown."""
    return Entry(
        network=network,
        config=config,
        defaults={"backbone": name},
        image_size=timm_image_size(name),
        num_classes=1000,
        summary=summary,
    )


FAMILIES = {
    "timm": lambda name: _entry(PlainTimm, TimmConfig, name, f"timm's {name}"),
    "dsop-timm": lambda name: _entry(DSoPTimm, DSoPTimmConfig, name, f"DSoP on timm's {name}"),
}
