"""Networks that are exported with their second-order pooling: iSQRT-COV, MPN-COV and alternatives.

Papers: iSQRT-COV and MPN-COV, as in fast-MPN-COV (ResNets with conv5_x at stride 1; VGG-D); AlexNet with the
seven poolings of the authors' slides on iSQRT-COV. iSQRT-COV with the Frobenius norm is `isqrt-alexnet` with
`pooling.prenorm="frobenius"`. Any other pooling is set on any backbone by the option `pooling`, such as
`create_model("resnet50", pooling="cbp")`.
"""

from torch import nn

from sopdeploy.backbones.alexnet_vgg import AlexNetConfig, VGGConfig
from sopdeploy.backbones.base import initialize
from sopdeploy.backbones.cifar_resnet import SmallResNetConfig
from sopdeploy.backbones.efficientnet import HEAD_CHANNELS, EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import ResNetConfig
from sopdeploy.config import Count
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.newton_schulz import NewtonSchulzOptions
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.residual import dimension_reduction
from sopdeploy.models.base import Classifier, Entry
from sopdeploy.models.plain import PlainAlexNet, PlainResNet, PlainSmallResNet, PlainVGG

ISQRT = "iSQRT-COV (iterated square root of the covariance)"
MPNCOV = "MPN-COV (square root by eigenvalues; cannot be exported)"


class SecondOrderEfficientNetConfig(EfficientNetConfig, NewtonSchulzOptions):
    """EfficientNet-b0, and the `width` of the covariance."""

    pooling: GapConfig = GapConfig()  # fixed: this network has its own second-order pooling
    width: Count = 64


class SecondOrderEfficientNet(Classifier, EfficientNet):
    """EfficientNet-b0 with DR and the root of the covariance instead of its global average."""

    classifier_parts = ("reduction", "root", "dropout", "classifier")
    config: SecondOrderEfficientNetConfig

    def __init__(self, config: SecondOrderEfficientNetConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.reduction = dimension_reduction(HEAD_CHANNELS, config.width, nn.SiLU)
        self.root = ISqrtCov(config.width, config.newton_schulz())
        self.classifier = nn.Linear(self.root.out_features, num_classes)
        initialize(self.reduction)


ENTRIES = {
    **{
        f"{pooling}-resnet{depth}": Entry(
            PlainResNet,
            ResNetConfig,
            {"depth": depth, "conv5_stride": 1, "pooling": pooling},
            f"{title} on ResNet-{depth}",
        )
        for pooling, title, depths in (("isqrt", ISQRT, (18, 34, 50, 101)), ("mpncov", MPNCOV, (18, 50, 101)))
        for depth in depths
    },
    **{
        f"isqrt-resnet{depth}": Entry.at_32(
            PlainSmallResNet,
            SmallResNetConfig,
            {"depth": depth, "pooling": "isqrt"},
            f"{ISQRT} on ResNet-{depth}",
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    **{
        f"{pooling}-vgg16": Entry(
            PlainVGG, VGGConfig, {"pooling": pooling, "classifier": classifier}, f"{title} on VGG-16"
        )
        for pooling, classifier, title in (
            ("isqrt", "mlp", ISQRT),
            ("mpncov", "mlp", MPNCOV),
            ("bcnn", "linear", "B-CNN (bilinear pooling)"),
            ("cbp", "linear", "compact bilinear pooling"),
            ("netvlad", "linear", "NetVLAD"),
        )
    },
    **{
        f"{pooling}-alexnet": Entry(PlainAlexNet, AlexNetConfig, {"pooling": pooling}, f"{title} on AlexNet")
        for pooling, title in (
            ("isqrt", ISQRT),
            ("mpncov", MPNCOV),
            ("bcnn", "B-CNN (bilinear pooling)"),
            ("deepo2p", "DeepO2P (matrix logarithm; cannot be exported)"),
            ("improved-bcnn", "improved B-CNN (square root by eigenvalues; cannot be exported)"),
            ("g2denet", "G2DeNet (Gaussian embedding by eigenvalues; cannot be exported)"),
        )
    },
    "isqrt-efficientnet-b0": Entry(
        SecondOrderEfficientNet,
        SecondOrderEfficientNetConfig,
        {},
        "EfficientNet-b0 with iSQRT-COV in place of its global average",
    ),
}
