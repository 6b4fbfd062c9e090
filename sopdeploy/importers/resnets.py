"""Importers of ResNets: torchvision's (also used by timm's plain ResNets) and the CIFAR ResNets.

torchvision publishes some networks twice, with different preprocessing. Its files are identified by their
hash; for other files the config.json of timm's hub next to the file applies, or else a resize to 256 and a
crop of 224.
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path

from sopdeploy.backbones.resnet import BLOCKS, STAGES
from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.source import ConvertedWeights, WeightFile, rename_tensors
from sopdeploy.importers.timm_network import FROM_HUB_CONFIG, hub_preprocess, read_hub_config

BASIC_BLOCK_DEPTHS = {18, 34}
RESNET_TENSOR = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01])|fc)\.[a-z_]+")
CIFAR_TENSOR = re.compile(r"(conv1|bn1|layer[123]\.\d+\.(conv[12]|bn[12]|downsample\.[01])|fc)\.[a-z_]+")
CIFAR_SIDE = 32


def is_resnet_tensor(name: str) -> bool:
    """Check whether *name* is a tensor name of a ResNet for 224-pixel images."""
    return RESNET_TENSOR.fullmatch(name) is not None


def resnet_depth(path: Path, names: Iterable[str]) -> int:
    """Find the depth of the ResNet with the tensors *names*; raises `WeightsError`."""
    names = set(names)
    counts = tuple(_count_blocks(names, stage) for stage in STAGES)
    basic = "layer1.0.conv3.weight" not in names
    for depth, blocks in BLOCKS.items():
        if blocks == counts and (depth in BASIC_BLOCK_DEPTHS) == basic:
            return depth
    kind = "basic blocks" if basic else "bottlenecks"
    raise WeightsError(f"{path}: a ResNet of {counts} {kind} is not in the catalog")


def _count_blocks(names: Iterable[str], stage: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{stage}.")})


class TorchvisionResNet:
    """torchvision's ResNets: `conv1`, `bn1`, `layer1` to `layer4`, `fc`."""

    project = "torchvision"

    def matches(self, file: WeightFile, _model: str, /) -> bool:
        """Check for four stages and `fc`."""
        return {"conv1.weight", "layer4.0.conv1.weight", "fc.weight"} <= file.tensors.keys()

    def convert(self, file: WeightFile, _model: str, /) -> ConvertedWeights:
        """Map the network; the names are the same."""
        depth = resnet_depth(file.path, file.tensors)
        found = published_preprocess(depth, sha256(file.path))
        if found is None and (config := read_hub_config(file.path)):
            found = hub_preprocess(file.path, config), FROM_HUB_CONFIG
        return ConvertedWeights(
            description=f"ResNet-{depth} of torchvision",
            model=f"resnet{depth}",
            tensors=rename_tensors(file, lambda name: name if is_resnet_tensor(name) else None),
            num_classes=len(file.classifier_weight("fc.weight")),
            preprocess=found[0] if found else Preprocess(),
            required={"depth": depth, "pooling.kind": "gap"},
            labels="imagenet",
            notes=(found[1],) if found else (),
        )


def published_preprocess(depth: int, digest: str) -> tuple[Preprocess, str] | None:
    """Find the preprocessing of the torchvision weights with this SHA-256, and a note with their name.

    The names of torchvision's files end in the first eight digits.
    """
    models = importlib.import_module("torchvision.models")
    name = f"resnet{depth}"
    for weights in models.get_model_weights(name) if name in models.list_models() else ():
        if weights.url.endswith(f"-{digest[:8]}.pth"):
            rules = weights.transforms()
            preprocess = Preprocess(
                resize=rules.resize_size[0],
                crop=rules.crop_size[0],
                interpolation=rules.interpolation.value,
                mean=tuple(rules.mean),
                std=tuple(rules.std),
            )
            return preprocess, f"preprocessing of torchvision's {weights}"
    return None


class CifarResNet:
    """ResNets of pytorch_resnet_cifar10; `linear` becomes `fc`, `shortcut` becomes `downsample`."""

    project = "pytorch_resnet_cifar10"

    def matches(self, file: WeightFile, _model: str, /) -> bool:
        """Check for three stages and `linear`."""
        names = file.tensors.keys()
        return {"conv1.weight", "layer3.0.conv1.weight", "linear.weight"} <= names and not any(
            name.startswith("layer4.") for name in names
        )

    def convert(self, file: WeightFile, _model: str, /) -> ConvertedWeights:
        """Map the network; its depth is 6n + 2 for n blocks per stage."""
        depth = 6 * _count_blocks(file.tensors, "layer1") + 2
        projects = any(".shortcut." in name for name in file.tensors)

        def rename(source: str) -> str | None:
            name = source.replace("linear.", "fc.").replace(".shortcut.", ".downsample.")
            return name if CIFAR_TENSOR.fullmatch(name) else None

        return ConvertedWeights(
            description=f"ResNet-{depth} for CIFAR of {self.project}",
            model=f"resnet{depth}",
            tensors=rename_tensors(file, rename),
            num_classes=len(file.classifier_weight("linear.weight")),
            preprocess=Preprocess(resize=CIFAR_SIDE, crop=CIFAR_SIDE),
            required={"depth": depth, "pooling.kind": "gap"},
            detected={
                "base_width": len(file.tensor("conv1.weight")),
                "shortcut": "projection" if projects else "pad",
            },
            labels="cifar10",
        )
