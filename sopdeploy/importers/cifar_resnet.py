"""ResNets for 32-pixel images of akamaster/pytorch_resnet_cifar10.

Three stages of basic blocks, head `linear`, shortcuts without parameters (option A) or called
`shortcut` (option B). Pictures are normalised with the mean and deviation of ImageNet.
"""

import re

from sopdeploy.importers.resnet_layout import blocks_of, matrix, tensor
from sopdeploy.importers.source import Translation, renamed
from sopdeploy.importers.weight_file import WeightFile
from sopdeploy.preprocess import Preprocess

PARTS = re.compile(r"(conv1|bn1|layer[123]\.\d+\.(conv[12]|bn[12]|downsample\.[01])|fc)\.[a-z_]+")
SIDE = 32


class CifarResNet:
    """`linear` is `fc` here, `shortcut` `downsample`."""

    project = "pytorch_resnet_cifar10"

    def recognises(self, file: WeightFile, _name: str, /) -> bool:
        """Say whether there are three stages and `linear`."""
        names = file.tensors.keys()
        return {"conv1.weight", "layer3.0.conv1.weight", "linear.weight"} <= names and not any(
            name.startswith("layer4.") for name in names
        )

    def translate(self, file: WeightFile, _name: str, /) -> Translation:
        """Return the network; its depth is 6n + 2 for n blocks a stage."""
        depth = 6 * blocks_of(file.tensors, "layer1") + 2
        projects = any(".shortcut." in name for name in file.tensors)
        return Translation(
            looks_like=f"ResNet-{depth} for CIFAR of {self.project}",
            name=f"resnet{depth}",
            mapped=renamed(file, place),
            num_classes=len(matrix(file.path, file.tensors, "linear.weight")),
            preprocess=Preprocess(resize=SIDE, crop=SIDE),
            must={"depth": depth, "pooling.kind": "gap"},
            read={
                "base_width": len(tensor(file.path, file.tensors, "conv1.weight")),
                "shortcut": "projection" if projects else "pad",
            },
            labels="cifar10",
        )


def place(name: str) -> str | None:
    """Return what *name* is here."""
    ours = name.replace("linear.", "fc.").replace(".shortcut.", ".downsample.")
    return ours if PARTS.fullmatch(ours) else None
