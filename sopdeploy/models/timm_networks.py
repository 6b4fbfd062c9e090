"""Networks of timm, plain (`timm:NAME`) and with DSoP's branches (`dsop-timm:NAME`).

NAME is timm's own, with or without a tag (`resnet18.a1_in1k`). The inference model is timm's network with
timm's key names, so timm's weight files fit.
"""

from sopdeploy.backbones.timm_backbone import TimmBackbone, TimmConfig, timm_image_size
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.dsop import DSoP, DSoPConfig, PaperBranches


class PlainTimm(Classifier, TimmBackbone):
    """A network of timm without changes."""

    inference_class = TimmBackbone

    def remove_classifier(self, image_size: int) -> int:
        """Replace timm's classifiers, two in a distilled network; return the length of the vector."""
        del image_size
        self.wrapped[0].reset_classifier(0)
        return self.head_channels


class DSoPTimmConfig(TimmConfig, DSoPConfig):
    """A network of timm with branches."""


class DSoPTimm(DSoP, TimmBackbone):
    """DSoP on a network of timm: a branch after every stage from stride 4 on, as on ResNet-18.

    Assumptions, because the paper does not cover these networks: a branch has two blocks of the kind that
    `nearest_block` selects, then batch norm and ReLU, because many of timm's stages end without either;
    covariances have at most 256 channels; all losses have the same weight.
    """

    inference_class = TimmBackbone
    taps_are_stages = True
    normalize_branches = True
    config: DSoPTimmConfig

    def paper_branches(self) -> PaperBranches:
        """Return two blocks and at most 256 channels for every stage; raise `ConfigError` without stages."""
        if not self.tap_channels:
            raise ConfigError(
                f"timm:{self.config.backbone} has no feature maps (batch, channels, height, width) for "
                "branches; choose a network with named stages"
            )
        return super().paper_branches()


def timm_entry(family: str, name: str) -> Entry:
    """Build the entry of `timm:NAME` or `dsop-timm:NAME`, with the image size of timm's weights.

    Raises `ConfigError` if timm has no network *name*.
    """
    side = timm_image_size(name)
    if family == "timm":
        return Entry(PlainTimm, TimmConfig, {"backbone": name}, f"timm's {name}", side)
    return Entry(DSoPTimm, DSoPTimmConfig, {"backbone": name}, f"DSoP on timm's {name}", side)
