"""ResNets of torchvision, and of whoever keeps its names (timm's plain ResNets do)."""

from sopdeploy.importers.resnet_layout import is_part, matrix, resnet_depth
from sopdeploy.importers.source import Translation, renamed
from sopdeploy.importers.weight_file import WeightFile
from sopdeploy.preprocess import Preprocess


class TorchvisionResNet:
    """`conv1`, `bn1`, `layer1` to `layer4`, `fc`: the names of this project, too."""

    project = "torchvision"

    def recognises(self, file: WeightFile, _name: str, /) -> bool:
        """Say whether there are four stages and `fc`."""
        return {"conv1.weight", "layer4.0.conv1.weight", "fc.weight"} <= file.tensors.keys()

    def translate(self, file: WeightFile, _name: str, /) -> Translation:
        """Return the network as it is; its stride in conv5_x is 2 unless the user knows better."""
        depth = resnet_depth(file.path, file.tensors)
        return Translation(
            looks_like=f"ResNet-{depth} of torchvision",
            name=f"resnet{depth}",
            mapped=renamed(file, lambda name: name if is_part(name) else None),
            num_classes=len(matrix(file.path, file.tensors, "fc.weight")),
            preprocess=Preprocess(),
            must={"depth": depth, "pooling.kind": "gap"},
            labels="imagenet",
        )
