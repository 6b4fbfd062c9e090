"""One small model for each class of network in the catalog: few layers as well as few channels."""

from typing import Any

from sopdeploy.models.backbones.efficientnet import EfficientNet
from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.pooled import SecondOrderEfficientNet
from sopdeploy.models.registry import CATALOG
from tests.sweep.steps import Small

NARROW: dict[str, Any] = {"width": 8, "iterations": 2}
HEADS: dict[str, Any] = {"aux_widths": (8, 8, 8), "iterations": 2}
FEW_GROUPS: dict[str, Any] = {"cardinality": 1, "group_width": 4}
LITE: dict[str, Any] = {"width": 0.1, "depth": 0.1}
ONE_BLOCK: dict[str, Any] = {"blocks": 1}
# A covariance needs two positions
ONE_EACH: dict[str, Any] = {"blocks_per_stage": 1, "conv5_stride": 1}
TWO_OF_FOUR: dict[str, Any] = {
    **ONE_EACH,
    "components": 4,
    "chosen": 2,
    "component_widths": (6,),
    "gate_widths": (),
    "iterations": 2,
}

# Classes in recipes, which `test_recipe_walks` exports, too
WALKED = (
    Small("resnet8", 16, {"pooling": {"kind": "isqrt", **NARROW}}),
    Small("gmgap-16-8-resnet18", 8, {**TWO_OF_FOUR, "component": "gap"}),
    Small("gmsop-16-8-resnet18", 8, TWO_OF_FOUR),
    Small(
        "gsop-net2-preact-resnet164",
        28,  # maps of 14 x 14 positions, which the 8 x 8 of the covariance do not divide
        {
            **ONE_BLOCK,
            "block_stages": ("layer3",),
            "attention": "concatenation",
            "cov_width": 32,
            "final_width": 8,
            "iterations": 2,
        },
    ),
)
# Lowered to ONNX and compared: one for each other inference class
LOWERED = (
    Small("resnext29-8x64d", 8, FEW_GROUPS),
    Small("dsop-preact-resnet110", 8, {**ONE_BLOCK, **HEADS}),
    Small("vgg16-bn", 32, {"pooling": "gap", "classifier": "linear"}),
    Small("efficientnet-lite0", 32, LITE),
    Small("alexnet", 64, {"pooling": {"kind": "flatten", "side": 1}, "classifier": "linear"}),
    Small("gsop-net1-resnet26", 32, {"cov_width": 32, "block_stages": ("layer4",)}),
    Small("gsop-net1-efficientnet-lite0", 32, {**LITE, "cov_width": 32}),
    Small(
        "gmsop-4-2-efficientnet-lite0",
        64,
        {**LITE, "component_widths": (6,), "gate_widths": (), "iterations": 2},
    ),
    Small(
        "avesop-16-resnet18",
        8,
        {**ONE_EACH, "components": 3, "component_widths": (6,), "iterations": 2},
    ),
    Small("netvlad-64-resnet18", 8, {**ONE_EACH, "words": 3}),
    Small(
        "dsop-timm:test_resnet",
        32,
        {"aux_widths": (8,) * 4, "aux_blocks": (1,) * 4, "iterations": 2},
    ),
    Small("head:resnet8", 16, {"head": {"taps": ("layer2.0", "layer3.0"), **NARROW}}),
    Small("gmsop-head:resnet8", 16, {"head": {"gate_width": 4, **NARROW}}),
    Small("head:timm:test_efficientnet", 64, {"head": NARROW}),
)
# 242 operators: lowered by `make test-nightly`
TOO_LONG = (EfficientNet, SecondOrderEfficientNet)
# compared with plain networks: their inference class is above, or takes too long for every run
DETACHED = (
    Small("resnet18", 32, {"conv5_stride": 1}),
    Small(
        "dsop-resnet18", 32, {"aux_widths": (8,) * 4, "aux_blocks": (1,) * 4, "iterations": 2}
    ),
    Small("efficientnet-b0", 32),
    Small("isqrt-efficientnet-b0", 64, NARROW),
    Small("preact-resnet110", 8, ONE_BLOCK),
    Small("dsop-efficientnet-b0", 32, {"iterations": 2}),
    Small("dsop-efficientnet-lite0", 32, {**LITE, "iterations": 2}),
    Small("dsop-resnet8", 8, HEADS),
    Small("dsop-resnext29-8x64d", 8, {**FEW_GROUPS, **HEADS}),
    Small("sgmoe-16-8-resnet18", 8, TWO_OF_FOUR),
    Small("timm:resnet18", 32),
    Small("timm:convnext_atto", 32),
    Small("dsop-timm:mobilenetv3_small_100", 64),
    Small("dsop-timm:regnety_002", 64),
)
ALL = (*LOWERED, *WALKED, *DETACHED)
# Every pooling, and every form of one that computes something else
POOLINGS: tuple[dict[str, Any], ...] = (
    {"kind": "gap"},
    {"kind": "flatten", "side": 2},
    {"kind": "flatten", "side": 1},
    {"kind": "isqrt"},
    {
        "kind": "isqrt",
        "width": 5,
        "iterations": 3,
        "prenorm": "frobenius",
        "compensation": "batch_norm",
    },
    {"kind": "isqrt", "compensation": "none"},
    {"kind": "isqrt", "width": 3, "reduction": "linear"},
    {"kind": "mpncov"},
    {"kind": "mpncov", "width": 5},
    {"kind": "deepo2p"},
    {"kind": "bcnn"},
    {"kind": "improved-bcnn"},
    {"kind": "g2denet"},
)
GSOP: dict[str, Any] = {"blocks": 2, "cov_width": 32}
BRANCHES: dict[str, Any] = {"base_width": 8, "aux_widths": (8,) * 4, "aux_blocks": (1,) * 4}
RELEASED_MIXTURE: dict[str, Any] = {
    "gate_widths": (6,),
    "gate_norm": True,
    "noise_per": "image",
}
# Other forms of the same classes, whose counts and outputs have goldens, too
VARIANTS = (
    *(Small("resnet8", 16, {"base_width": 2, "pooling": pooling}) for pooling in POOLINGS),
    Small("resnet8", 8, {"base_width": 8, "pooling": "isqrt"}),  # fewer positions than channels
    Small("resnet18", 32, {"depth": 26, "base_width": 8, "bottleneck_stride": "v1"}),
    Small("dsop-resnet18", 64, {**BRANCHES, "conv5_stride": 2, "aux_pooling": "gap"}),
    Small("dsop-resnet50", 32, {**BRANCHES, "bottleneck_stride": "v1"}),
    Small("dsop-resnet20", 16, {"shortcut": "projection"}),
    *(
        Small("gsop-net1-preact-resnet164", 32, {**GSOP, "attention": kind})
        for kind in ("channel", "position", "sum", "maximum", "concatenation")
    ),
    Small("gsop-net2-preact-resnet164", 32, {**GSOP, **RELEASED}),
    Small("gsop-net1-preact-resnet164", 32, {**GSOP, **RELEASED, "attention": "concatenation"}),
    Small("gsop-net1-resnet26", 32, {"base_width": 16, **RELEASED, "attention": "sum"}),
    Small("gmsop-16-8-resnet18", 8, {**TWO_OF_FOUR, **RELEASED_MIXTURE}),
    Small("resnet18-64px", 8, ONE_EACH),
)
# In full size, whose branches or blocks with attention have a golden
STRUCTURES = (
    *(Small(name, 224) for name in CATALOG if name.startswith(("dsop-", "gsop-"))),
    Small("dsop-resnet18", 224, {"aux_blocks": (0, 1, (2, 0), (0, 3))}),
    Small("dsop-resnet18", 224, {"aux_widths": (128,) * 4}),
    Small("dsop-resnet50", 224, {"aux_stride": "table"}),
    Small("dsop-resnet20", 32, {"depth": 32}),
    Small("dsop-resnet20", 32, {"depth": 32, "base_width": 64}),
    Small("dsop-resnet20", 32, {"depth": 32, "main_weight": 0.5, "aux_weights": (1, 0, 2)}),
    Small("dsop-preact-resnet164", 32, {"blocks": 5}),
    Small("dsop-efficientnet-b0", 224, {"aux_widths": (512,) * 7}),
    Small("gsop-net2-resnet50", 224, {"depth": 101}),
    Small("gsop-net1-resnet26", 224, {"block_stages": ("layer3",)}),
    Small("gsop-net2-resnet26", 224, {"block_stages": ()}),
    Small("gsop-net2-resnet26", 224, {"block_stages": ("layer4",)}),
    Small("gsop-net2-preact-resnet164", 32, {"blocks": 3}),
    Small("gsop-net1-preact-resnet164", 32, {"blocks": 1}),
)
