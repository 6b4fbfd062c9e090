"""ResNets of torchvision, and of whoever keeps its names (timm's plain ResNets do).

torchvision publishes some networks twice, measured on pictures prepared differently. Its files are known
by their hash; for others a card of timm's hub beside the file counts, else the usual 256, 224.
"""

import importlib

from sopdeploy.importers.file_hash import sha256
from sopdeploy.importers.resnet_layout import is_part, matrix, resnet_depth
from sopdeploy.importers.source import Translation, renamed
from sopdeploy.importers.timm_card import FROM_CARD, preprocess_of, read_card
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
        rules, note = preprocessing(file, depth)
        return Translation(
            looks_like=f"ResNet-{depth} of torchvision",
            name=f"resnet{depth}",
            mapped=renamed(file, lambda name: name if is_part(name) else None),
            num_classes=len(matrix(file.path, file.tensors, "fc.weight")),
            preprocess=rules,
            must={"depth": depth, "pooling.kind": "gap"},
            labels="imagenet",
            notes=(note,) if note else (),
        )


def preprocessing(file: WeightFile, depth: int) -> tuple[Preprocess, str | None]:
    """Return how pictures are prepared for *file*, and where that is from where it is not the usual."""
    published = published_rules(depth, sha256(file.path))
    if published is not None:
        return published
    card = read_card(file.path)
    if card:
        return preprocess_of(file.path, card), FROM_CARD
    return Preprocess(), None


def published_rules(depth: int, digest: str) -> tuple[Preprocess, str] | None:
    """Return the rules of torchvision's weights whose file has this hash, and their name.

    The names of its files end in the first eight digits.
    """
    models = importlib.import_module("torchvision.models")
    name = f"resnet{depth}"
    for weights in models.get_model_weights(name) if name in models.list_models() else ():
        if weights.url.endswith(f"-{digest[:8]}.pth"):
            rules = weights.transforms()
            return Preprocess(
                resize=rules.resize_size[0],
                crop=rules.crop_size[0],
                interpolation=rules.interpolation.value,
                mean=tuple(rules.mean),
                std=tuple(rules.std),
            ), f"preprocessing of torchvision's {weights}"
    return None
