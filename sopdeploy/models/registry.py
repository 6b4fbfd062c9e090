"""The networks of the catalog by family: their defaults, summaries and image sizes, and what builds them.

The module of a network is imported when its class is used, so this module does not import
torch.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import pydantic

from sopdeploy.base.config import FieldValues, StrictModel, first_problem
from sopdeploy.base.nearest import ask_for
from sopdeploy.base.plugins import MODELS, import_if_named
from sopdeploy.errors import ConfigError
from sopdeploy.models.families import PAGE, lead_on

if TYPE_CHECKING:
    from sopdeploy.models.base import Classifier


@dataclass(frozen=True, slots=True)
class Entry:
    """A network and its config, each as a class or as `module:Class`.

    From a `Backbone`, `network` derives a `Classifier`. `image_size` is that of its paper, in
    pixels. `name` is that under which `entry` found it.
    """

    network_source: "str | type[Classifier]"
    config_source: str | type[StrictModel]
    defaults: Mapping[str, Any]
    summary: str
    image_size: int = 224
    num_classes: int = 1000
    name: str = ""

    @property
    def network(self) -> "type[Classifier]":
        """The class of the network."""
        from sopdeploy.models.base import as_classifier  # noqa: PLC0415 # imports torch

        return as_classifier(import_if_named(self.network_source))

    @property
    def title(self) -> str:
        """What the summary calls the network, without its explanations: "ResNet-8", "DSoP on ResNet-18"."""
        explanations = r" \([^)]*\)| for \d+-pixel images|[:,] .*"
        return re.sub(explanations, "", self.summary).removeprefix("plain ")

    @property
    def config(self) -> type[StrictModel]:
        """The class of the network's config."""
        return import_if_named(self.config_source)

    def make_config(self, values: Mapping[str, Any]) -> StrictModel:
        """Build the config from the defaults and *values*.

        Raises `ConfigError` with the first key or value that the network does not accept.
        """
        return parse_options(self.name, self.config, {**self.defaults, **values})

    def build(self, num_classes: int | None = None, **config: Any) -> "Classifier":
        """Build the network with fresh weights, in train mode, as `create_model` does."""
        classes = self.num_classes if num_classes is None else num_classes
        if classes < 1:
            raise ConfigError(f"num_classes: must be at least 1 (got {classes})")
        return self.network(self.make_config(config), classes)


def with_config(
    network: str,
    defaults: Mapping[str, Any],
    summary: str,
    image_size: int = 224,
    num_classes: int = 1000,
) -> Entry:
    """Build the entry of a *network* whose config has its name and `Config`."""
    return Entry(
        network_source=network,
        config_source=f"{network}Config",
        defaults=defaults,
        summary=summary,
        image_size=image_size,
        num_classes=num_classes,
    )


def at_32(network: str, defaults: Mapping[str, Any], title: str) -> Entry:
    """Build the entry of a network for the 32-pixel images of CIFAR-10."""
    return with_config(
        network, defaults, f"{title} for 32-pixel images", image_size=32, num_classes=10
    )


def at_64(network: str, defaults: Mapping[str, Any], title: str) -> Entry:
    """Build the entry of a network of GM-SOP's paper, for the 64-pixel images of ImageNet."""
    return with_config(
        f"sopdeploy.models.gmsop:{network}",
        defaults,
        f"{title} for 64-pixel images",
        image_size=64,
    )


RESNET = "sopdeploy.models.backbones.resnet:ResNet"
VGG = "sopdeploy.models.backbones.alexnet_vgg:VGG"
LITE = "sopdeploy.models.backbones.efficientnet:EfficientNetLite"
CIFAR = "sopdeploy.models.backbones.cifar_resnet"
LITE_2 = {"width": 1.1, "depth": 1.2, "dropout": 0.3}
DSOP_NETWORKS = "sopdeploy.models.dsop_networks"
DSOP_LITE = f"{DSOP_NETWORKS}:DSoPEfficientNetLite"
PREACT_NETWORKS: dict[str, tuple[dict[str, int | str], str]] = {
    "preact-resnet110": ({"blocks": 18, "block": "basic"}, "pre-activation ResNet-110"),
    "preact-resnet164": ({"blocks": 18, "block": "bottleneck"}, "pre-activation ResNet-164"),
    "wrn-22-10": ({"blocks": 3, "block": "basic", "widen": 10}, "WRN-22-10"),
    "wrn-28-10": ({"blocks": 4, "block": "basic", "widen": 10}, "WRN-28-10"),
}
ISQRT = "iSQRT-COV (iterated square root of the covariance)"
MPNCOV = "MPN-COV (square root by eigenvalues; cannot be exported)"
POOLED = {
    **{
        f"resnet{depth}": with_config(RESNET, {"depth": depth}, f"plain ResNet-{depth}")
        for depth in (18, 34, 50, 101)
    },
    "alexnet": with_config(
        "sopdeploy.models.backbones.alexnet_vgg:AlexNet", {}, "plain AlexNet"
    ),
    **{
        name: with_config(VGG, {"pooling": "flatten", "batch_norm": norm}, f"plain {title}")
        for name, norm, title in (
            ("vgg16", False, "VGG-16"),
            ("vgg16-bn", True, "VGG-16 with batch norm"),
        )
    },
    "efficientnet-b0": with_config(
        "sopdeploy.models.backbones.efficientnet:EfficientNet", {}, "plain EfficientNet-b0"
    ),
    "efficientnet-lite0": with_config(LITE, {}, "plain EfficientNet-Lite0"),
    "efficientnet-lite2": with_config(
        LITE,
        LITE_2,
        "plain EfficientNet-Lite2",
        image_size=260,
    ),
    **{
        f"resnet{depth}": at_32(
            f"{CIFAR}:SmallResNet", {"depth": depth}, f"plain ResNet-{depth}"
        )
        for depth in (8, 20)
    },
    **{
        name: at_32(f"{CIFAR}:PreActResNet", defaults, f"plain {title}")
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"resnext29-{n}x64d": at_32(
            f"{CIFAR}:ResNeXt", {"cardinality": n}, f"plain ResNeXt-29 {n}x64d"
        )
        for n in (8, 16)
    },
    **{
        f"{pooling}-resnet{depth}": with_config(
            RESNET,
            {"depth": depth, "conv5_stride": 1, "pooling": pooling},
            f"{title} on ResNet-{depth}",
        )
        for pooling, title, depths in (("isqrt", ISQRT, (50, 101)), ("mpncov", MPNCOV, (50,)))
        for depth in depths
    },
    "isqrt-efficientnet-b0": with_config(
        "sopdeploy.models.pooled:SecondOrderEfficientNet",
        {},
        "EfficientNet-b0 with iSQRT-COV in place of its global average",
    ),
}
DSOP = {
    **{
        f"dsop-resnet{depth}": with_config(
            f"{DSOP_NETWORKS}:DSoPResNet",
            {"depth": depth},
            f"DSoP on ResNet-{depth}: four second-order branches, detached before export",
        )
        for depth in (18, 34, 50)
    },
    "dsop-efficientnet-b0": with_config(
        f"{DSOP_NETWORKS}:DSoPEfficientNet",
        {},
        "DSoP on EfficientNet-b0: two second-order branches, detached before export",
    ),
    "dsop-efficientnet-lite0": with_config(
        DSOP_LITE,
        {},
        "DSoP on EfficientNet-Lite0, to fine-tune from ImageNet weights: two branches, detached before export",
    ),
    "dsop-efficientnet-lite2": with_config(
        DSOP_LITE,
        LITE_2,
        "DSoP on EfficientNet-Lite2, to fine-tune from ImageNet weights: two branches, detached before export",
        image_size=260,
    ),
    **{
        f"dsop-resnet{n}": at_32(
            f"{DSOP_NETWORKS}:DSoPSmallResNet", {"depth": n}, f"DSoP on ResNet-{n}"
        )
        for n in (8, 20)
    },
    **{
        f"dsop-{name}": at_32(f"{DSOP_NETWORKS}:DSoPPreActResNet", defaults, f"DSoP on {title}")
        for name, (defaults, title) in PREACT_NETWORKS.items()
    },
    **{
        f"dsop-resnext29-{n}x64d": at_32(
            f"{DSOP_NETWORKS}:DSoPResNeXt", {"cardinality": n}, f"DSoP on ResNeXt-29 {n}x64d"
        )
        for n in (8, 16)
    },
}
# Options of the released code; `models/gsop.py` explains them
GSOP_RELEASED = {
    "pre_relu": True,
    "channel_norm": False,
    "channel_activation": "none",
    "position_activation": "relu",
    "position_rectify": "scaled",
    "position_covariance": "uncentred",
    "position_upsampling": "average",
    "block_place": "inside",
    "strided_dr_stages": ("layer1",),
    "iterations": 3,
}
FINAL_POOLING = {1: "gap", 2: "isqrt"}  # of GSoP-Net1 and GSoP-Net2
GSOP = {
    **{
        f"gsop-net{net}-resnet{depth}": with_config(
            "sopdeploy.models.gsop:GSoPResNet",
            {"depth": depth, "final_pooling": final},
            f"GSoP-Net{net} on ResNet-{depth}: covariances scale the channels of every stage",
        )
        for net, final in FINAL_POOLING.items()
        for depth in (26, 50)
    },
    **{
        f"gsop-net{net}-preact-resnet164": with_config(
            "sopdeploy.models.gsop:GSoPPreActResNet",
            {"blocks": 18, "final_pooling": final},
            f"GSoP-Net{net} on PreAct-ResNet-164 for 32-pixel images",
            image_size=32,
            num_classes=100,
        )
        for net, final in FINAL_POOLING.items()
    },
    **{
        f"gsop-net{net}-efficientnet-lite0": with_config(
            "sopdeploy.models.gsop:GSoPEfficientNetLite",
            {"pooling": final},
            f"GSoP-Net{net} on EfficientNet-Lite0, to fine-tune from ImageNet weights",
        )
        for net, final in FINAL_POOLING.items()
    },
}
WRN_36_2 = {"blocks_per_stage": 4, "widen": 2}
GAP = {"component": "gap", "component_widths": (512,)}
WRN_SOP = {**WRN_36_2, "component_widths": (512, 128)}
SGMOE = {
    "component": "linear",
    "component_widths": (512,),
    "gate_widths": (),
    "fusion_norm": False,
    "dropout": 0.0,
}
RESNET_50 = {"blocks_per_stage": 6}
PARAMETRIC = {"component": "sop", "component_widths": (256, 128)}
AVERAGE_OF_16 = {"components": 16, "fusion_norm": True, "dropout": 0.2}
GMSOP = {
    **{
        name: at_64("GMSOPResNet", defaults, title)
        for name, title, defaults in (
            ("gmsop-16-8-resnet18", "GM-SOP (8 of 16 poolings) on ResNet-18", {}),
            ("gmsop-16-8-resnet50", "GM-SOP (8 of 16 poolings) on ResNet-50", RESNET_50),
            ("gmsop-16-8-wrn36-2", "GM-SOP (8 of 16 poolings) on WRN-36-2", WRN_SOP),
            ("gmgap-16-8-resnet18", "GM-GAP (8 of 16 poolings) on ResNet-18", GAP),
            (
                "gmgap-16-8-wrn36-2",
                "GM-GAP (8 of 16 poolings) on WRN-36-2",
                {**WRN_36_2, **GAP},
            ),
            ("sgmoe-16-8-resnet18", "one-layer SG-MoE on ResNet-18", SGMOE),
        )
    },
    **{
        name: at_64("AveragedResNet", defaults, title)
        for name, title, defaults in (
            ("resnet18-64px", "plain ResNet-18", {}),
            ("resnet50-64px", "plain ResNet-50", RESNET_50),
            ("wrn36-2", "plain WRN-36-2", WRN_36_2),
            ("resnet18-512d", "ResNet-18-512d", {"component_widths": (512,)}),
            ("resnet18-8256d", "ResNet-18-8256d", {"component_widths": (8256,)}),
            ("resnet50-512d", "ResNet-50-512d", {**RESNET_50, "component_widths": (512,)}),
            ("resnet50-8256d", "ResNet-50-8256d", {**RESNET_50, "component_widths": (8256,)}),
            ("srsop-resnet18", "SR-SOP on ResNet-18", {"component": "sop"}),
            ("parametric-srsop-resnet18", "parametric SR-SOP on ResNet-18", PARAMETRIC),
            (
                "avegap-16-resnet18",
                "Ave-GAP-16 on ResNet-18",
                {**AVERAGE_OF_16, "component_widths": (512,)},
            ),
            ("avesop-16-resnet18", "Ave-SOP-16 on ResNet-18", {**AVERAGE_OF_16, **PARAMETRIC}),
        )
    },
    "gmsop-4-2-efficientnet-lite0": with_config(
        "sopdeploy.models.gmsop:GMSOPEfficientNetLite",
        {},
        "GM-SOP (2 of 4 poolings) on EfficientNet-Lite0, as `fine-tune-gmsop` trained it in 0.3",
    ),
    "netvlad-64-resnet18": at_64(
        "NetVLADResNet", {}, "NetVLAD with 64 visual words on ResNet-18"
    ),
}
# Title and networks, in display order
FAMILIES = (
    (
        "Backbone, global pooling and classifier: first-order networks, iSQRT-COV and MPN-COV",
        POOLED,
    ),
    (
        "DSoP: detachable second-order pooling. Branches train a first-order network and are then removed",
        DSOP,
    ),
    ("GSoP-Net: second-order blocks that scale maps; GSoP-Net2 also pools by covariance", GSOP),
    (
        "GM-SOP: a gate selects K of N second-order poolings for each image, and their weights",
        GMSOP,
    ),
)
CATALOG: dict[str, Entry] = {
    name: item for _, entries in FAMILIES for name, item in entries.items()
}
OWN = CATALOG  # of the registry `MODELS`
# Functions (prefix, name) that build the entry of PREFIX:NAME
PREFIXES = {
    "head": "sopdeploy.models.second_order_head:head_entry",
    "dsop-head": "sopdeploy.models.second_order_head:head_entry",
    "gmsop-head": "sopdeploy.models.gated_head:gated_head_entry",
    "timm": "sopdeploy.models.timm_networks:timm_entry",
    "dsop-timm": "sopdeploy.models.timm_networks:timm_entry",
}


def entry(name: str) -> Entry:
    """Look up *name* in the catalog and among registered networks; raises `ConfigError` with near names.

    `timm:NAME` and `dsop-timm:NAME` are entries for every NAME of timm; building the latter
    needs a network with feature maps. `head:NAME` is one for every network NAME without
    training-only parts, and for `dsop-NAME`.
    """
    family, colon, rest = name.partition(":")
    registered: Entry | None
    if colon and family in PREFIXES:
        registered = import_if_named(PREFIXES[family])(family, rest)
    else:  # of the catalog, or registered by the user or a plug-in
        registered = MODELS.find(name)

    if registered is not None:
        return replace(registered, name=name)

    # A file in place of a name, or a name of timm without its prefix, such as resnet18.a1_in1k.
    if os.path.isfile(name):  # noqa: PTH113 - `Path.is_file` raises `OSError` for a long name
        hint = "`sopdeploy eval` and `export` read a checkpoint, `import` and `train --pretrained` weights"
    elif "." in name:
        hint = ask_for(f"timm:{name}")
    else:
        hint = lead_on(name, "networks", CATALOG) or MODELS.suggest(
            name, f"`sopdeploy models` lists them all, {PAGE} describes the families"
        )
    raise ConfigError(f"model {name!r} is not in the catalog; {hint}")


def make_config(name: str, values: Mapping[str, Any]) -> StrictModel:
    """Build the config of the network *name*, as `Entry.make_config` does."""
    return entry(name).make_config(values)


def parse_options(
    name: str, options: type[StrictModel], values: Mapping[str, Any]
) -> StrictModel:
    """Build the *options* of *name*; raise `ConfigError` with the first key or value that is not accepted."""
    try:
        return options(**values)
    except pydantic.ValidationError as problem:
        described = first_problem(problem, values)
        if problem.errors()[0]["type"] == "extra_forbidden":
            described += f"; its keys are {', '.join(options.model_fields)}"
        raise ConfigError(f"{name}: {described}") from problem


class CatalogModel(StrictModel):
    """A model of the catalog and the fields of its config that are not defaults."""

    name: str
    config: FieldValues = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check_catalog(self) -> "CatalogModel":
        make_config(self.name, self.config)
        return self


def create_model(name: str, *, num_classes: int | None = None, **config: Any) -> "Classifier":
    """Build network *name* of the catalog with fresh weights; `sopdeploy.create_model` can load others."""
    return entry(name).build(num_classes, **config)


def list_models(pattern: str = "*") -> list[str]:
    """List the names of networks.

    Args:
        pattern: Shell pattern of the names, such as `gsop*`.

    Returns:
        The names of the catalog in display order, then those that are registered.

    Examples:
        >>> sopdeploy.list_models("gsop-net1-*")
        ['gsop-net1-resnet26', 'gsop-net1-resnet50', 'gsop-net1-preact-resnet164', 'gsop-net1-efficientnet-lite0']
        >>> "dsop-resnet50" in sopdeploy.list_models()
        True
    """
    return [name for name in MODELS.names() if fnmatchcase(name, pattern)]
