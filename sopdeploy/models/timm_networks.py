"""Networks of timm, plain (`timm:NAME`) and with DSoP's branches (`dsop-timm:NAME`).

NAME is timm's own. What ships is timm's network with timm's key names, so its weight files fit.
"""

from torch import nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.timm_backbone import TimmBackbone, TimmConfig, timm_image_size
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches, shared_fields


class PlainTimm(Classifier, TimmBackbone):
    """A network of timm as it is."""

    def inference_model(self) -> Backbone:
        """Return another one."""
        return TimmBackbone(self.config, self.num_classes)

    def num_features(self) -> int:
        """Return the channels that the classifier sees."""
        return self.head_channels()


class DSoPTimmConfig(TimmConfig, DSoPConfig):
    """A network of timm with branches."""


class DSoPTimm(DSoP, TimmBackbone):
    """DSoP on a network of timm: a branch after every stage from stride 4 on, as on ResNet-18.

    Assumptions, the paper knows no such networks: a branch has two of our blocks nearest to timm's,
    then batch norm and ReLU, for many of timm's stages end without either; covariances of at most 256
    channels; all losses weigh alike.
    """

    config: DSoPTimmConfig

    def __init__(self, config: DSoPTimmConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.attach_branches()

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
        """Return batch norm and ReLU."""
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def inference_model(self) -> Backbone:
        """Return timm's network without branches."""
        return TimmBackbone(TimmConfig(**shared_fields(self.config, TimmConfig)), self.num_classes)

    def num_features(self) -> int:
        """Return the channels that the classifier sees."""
        return self.head_channels()


def plain_timm(name: str) -> Entry:
    """Return the entry of timm's network *name*; raises `ConfigError`."""
    return timm_entry(PlainTimm, TimmConfig, name, f"timm's {name}")


def dsop_timm(name: str) -> Entry:
    """Return the entry of timm's network *name* that learns with branches; raises `ConfigError`."""
    return timm_entry(DSoPTimm, DSoPTimmConfig, name, f"DSoP on timm's {name}")


def timm_entry(network: type[Classifier], config: type[TimmConfig], name: str, summary: str) -> Entry:
    """Return an entry whose images are as large as timm's weights want them."""
    return Entry(
        network=network,
        config=config,
        defaults={"backbone": name},
        image_size=timm_image_size(name),
        num_classes=1000,
        summary=summary,
    )


FAMILIES = {"timm": plain_timm, "dsop-timm": dsop_timm}
