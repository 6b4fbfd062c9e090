"""Importers of ResNets: torchvision's (also used by timm's plain ResNets) and the CIFAR ResNets.

torchvision publishes some networks twice, with different preprocessing. Its files are identified by their
hash; for other files the config.json of timm's hub next to the file applies, or else a resize to 256 and a
crop of 224.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path

from sopdeploy.backbones.resnet import BLOCKS, STAGES
from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.source import ConvertedWeights, WeightFile, rename_tensors
from sopdeploy.importers.timm_network import FROM_HUB_CONFIG, read_hub_config

BASIC_BLOCK_DEPTHS = {18, 34}
CIFAR_SIDE = 32


def resnet_depth(path: Path, names: Iterable[str]) -> int:
    """Find the depth of the ResNet with the tensors *names*; raises `WeightsError`."""
    names = set(names)
    counts = tuple(
        len({name.split(".")[1] for name in names if name.startswith(f"{stage}.")}) for stage in STAGES
    )
    basic = "layer1.0.conv3.weight" not in names
    for depth, blocks in BLOCKS.items():
        if blocks == counts and (depth in BASIC_BLOCK_DEPTHS) == basic:
            return depth
    kind = "basic blocks" if basic else "bottlenecks"
    raise WeightsError(
        f"{path}: a ResNet of {counts} {kind} is not in the catalog; `sopdeploy models` lists the networks"
    )


def stem_width(file: WeightFile) -> int:
    """Return the number of channels of `conv1`, the network's `base_width`."""
    return len(file.tensor("conv1.weight"))


def convert_torchvision_resnet(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a ResNet of torchvision; None for a file without four stages and `fc`."""
    if not {"conv1.weight", "layer4.0.conv1.weight", "fc.weight"} <= file.tensors.keys():
        return None
    depth = resnet_depth(file.path, file.tensors)
    published = published_preprocess(f"resnet{depth}", sha256(file.path))
    if published is None and (config := read_hub_config(file.path)):
        published = Preprocess.from_timm(config), FROM_HUB_CONFIG
    return ConvertedWeights(
        description=f"ResNet-{depth} of torchvision",
        model=f"resnet{depth}",
        tensors=rename_tensors(file),
        num_classes=len(file.tensor("fc.weight")),
        preprocess=published[0] if published else Preprocess(),
        required={"depth": depth, "pooling.kind": "gap"},
        detected={"base_width": stem_width(file)},
        labels="imagenet",
        notes=(published[1],) if published else (),
    )


def published_preprocess(name: str, digest: str) -> tuple[Preprocess, str] | None:
    """Find the preprocessing of torchvision's weights of *name* by their SHA-256; returns it with a note.

    The names of torchvision's files end in the first eight digits. None for other files.
    """
    models = importlib.import_module("torchvision.models")
    for weights in models.get_model_weights(name) if name in models.list_models() else ():
        if weights.url.endswith(f"-{digest[:8]}.pth"):
            preprocess = Preprocess.from_torchvision(weights.transforms())
            return preprocess, f"preprocessing of torchvision's {weights}"
    return None


def convert_cifar_resnet(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a ResNet of pytorch_resnet_cifar10; None for a file without three stages and `linear`.

    The depth is 6n + 2 for n blocks per stage. `linear` becomes `fc`, `shortcut` becomes `downsample`.
    """
    sources = file.tensors.keys()
    known = {"conv1.weight", "layer3.0.conv1.weight", "linear.weight"} <= sources
    if not known or any(source.startswith("layer4.") for source in sources):
        return None
    depth = 6 * len({source.split(".")[1] for source in sources if source.startswith("layer1.")}) + 2
    projects = any(".shortcut." in source for source in sources)
    return ConvertedWeights(
        description=f"ResNet-{depth} for CIFAR of pytorch_resnet_cifar10",
        model=f"resnet{depth}",
        tensors=rename_tensors(
            file, lambda name: name.replace("linear.", "fc.").replace(".shortcut.", ".downsample.")
        ),
        num_classes=len(file.tensor("linear.weight")),
        preprocess=Preprocess(resize=CIFAR_SIDE, crop=CIFAR_SIDE),
        required={"depth": depth, "pooling.kind": "gap"},
        detected={
            "base_width": stem_width(file),
            "shortcut": "projection" if projects else "pad",
        },
        labels="cifar10",
    )
