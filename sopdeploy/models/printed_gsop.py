"""What GSoP's Tables 2, 5 and 6 print.

The GFLOPs of Tables 5 and 6 belong to the released code, whose DR strides by 2 in conv2_x, and are divided by
those of a ResNet-50 that strides on the 1x1 convolutions (v1). Tables 2 and 6 count half of each covariance's
product and the scaling of the maps beside the convolutions.
"""

from typing import Any

from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.printed_row import Row

V1 = {"bottleneck_stride": "v1"}
STRIDED = {"strided_dr_stages": ("layer1",)}
COVARIANCE_AND_SCALE = "operations count half of the covariance's product and the scaling, too"


def block(attention: str, params: float, ops: float, extra: int) -> Row:
    """Return a row of Table 2: a block of ResNet-50's conv4_x."""
    return Row(
        source="GSoP, Table 2",
        model="gsop-net1-resnet50",
        config={"attention": attention},
        module="layer3.5.attention",
        params=params,
        ops=ops,
        extra_ops=extra,
        note=f"one {attention}-wise block in conv4_x; {COVARIANCE_AND_SCALE}",
    )


def ratio(model: str, config: dict[str, Any], params: float, ops: float) -> Row:
    """Return a row of Table 5, in which all is printed as times ResNet-50."""
    return Row(
        source="GSoP, Table 5", model=model, config=config, params=params, ops=ops, times_resnet50=True
    )


def cifar(model: str, params: float | None, ops: float | None = None, **more: Any) -> Row:
    """Return a row of Table 6: CIFAR-100."""
    return Row(source="GSoP, Table 6", model=model, num_classes=100, params=params, ops=ops, **more)


ROWS = (
    block("channel", 0.72, 0.0281, 128 * 129 // 2 * 14**2 + 1024 * 14**2),
    block("position", 0.16, 0.0262, 64 * 65 // 2 * 128 + 1024 * 14**2),
    ratio("gsop-net1-resnet50", RELEASED, 1.1, 1.6),
    ratio("gsop-net2-resnet50", RELEASED, 2.3, 1.7),
    ratio("isqrt-resnet50", {}, 2.2, 1.6),
    ratio("mpncov-resnet50", {}, 2.2, 1.6),
    ratio("se-resnet50", V1, 1.1, 1.0),
    ratio("cbam-resnet50", V1, 1.1, 1.0),
    ratio("ge-resnet50", V1, 1.3, 1.0),
    Row(
        source="GSoP, Table 5",
        model="resnet50",
        config={**V1, "conv5_stride": 1},
        ops=1.58,
        times_resnet50=True,
        reached=False,
        note="misprint, or another count: no strides give 1.58 (v1 1.57, v1.5 1.52 of itself, 1.61 of v1)",
    ),
    cifar("preact-resnet164", 1.7, 0.25),
    cifar("se-preact-resnet164", 1.9),
    cifar(
        "se-preact-resnet164",
        None,
        0.29,
        reached=False,
        note="misprint: convolutions and linear layers give 0.25, and nothing else costs 0.04",
    ),
    cifar(
        "preact-resnet164",
        2.5,
        0.52,
        config={"last_stride": 1, "pooling": {"kind": "mpncov", "width": 128}},
        extra_ops=128 * 129 // 2 * 16**2 + 12 * 128**3,
        cut=True,
        note="operations count the covariance and twelve products of the iterated root, too",
    ),
    cifar(
        "gsop-net1-preact-resnet164",
        2.9,
        0.55,
        config=STRIDED,
        extra_ops=6 * 3 * (64 * 65 // 2) * 16**2 + 6 * (64 * 32**2 + 128 * 16**2 + 256 * 16**2),
        note=COVARIANCE_AND_SCALE,
    ),
    cifar("gsop-net2-preact-resnet164", 3.6),
)
