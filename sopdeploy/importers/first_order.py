"""Importers of first-order networks: ResNets and VGG-16 of torchvision, CIFAR ResNets.

timm's plain ResNets have the names of torchvision's. VGG-16 has its convolutions under `features`, with the
same numbers as under `layers` here.
"""

import importlib
from collections.abc import Collection
from pathlib import Path

from sopdeploy.backbones.resnet import BLOCKS, STAGES
from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.conversion import ConvertedWeights, WeightFile, rename_tensors
from sopdeploy.importers.timm_network import FROM_HUB_CONFIG, read_hub_config
from sopdeploy.models.registry import CATALOG

BASIC_BLOCK_DEPTHS = {18, 34}
CIFAR_SIDE = 32
VGG_CONVOLUTIONS = 13
VGG_FLATTENED = 512 * 7 * 7  # inputs of its classifier


def resnet_depth(path: Path, names: Collection[str]) -> int:
    """Find the depth of the ResNet with the tensors *names*; raises `WeightsError`."""
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


def depth_name(family: str, depth: int, other: int) -> str:
    """Name the network of *family* with *depth* layers: in the catalog, or as an option of *other* layers."""
    name = f"{family}{depth}"
    return name if name in CATALOG else f"{family}{other} --option depth={depth}"


def convert_torchvision_resnet(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a ResNet of torchvision; None for a file without four stages and `fc`."""
    if not {"conv1.weight", "layer4.0.conv1.weight", "fc.weight"} <= file.tensors.keys():
        return None
    depth = resnet_depth(file.path, file.tensors)
    preprocess, notes = published_preprocess(f"resnet{depth}", file.path)
    return ConvertedWeights(
        description=f"ResNet-{depth} of torchvision",
        model=depth_name("resnet", depth, 50),
        tensors=rename_tensors(file),
        num_classes=len(file.tensor("fc.weight")),
        preprocess=preprocess,
        required={"depth": depth, "pooling.kind": "gap"},
        detected={"base_width": len(file.tensor("conv1.weight"))},
        labels="imagenet",
        notes=notes,
    )


def published_preprocess(name: str, path: Path) -> tuple[Preprocess, tuple[str, ...]]:
    """Find the preprocessing of a weight file of torchvision's network *name*, with a note on its origin.

    torchvision publishes some networks twice, with different preprocessing; its file names end in the first
    eight digits of the SHA-256. For other files the config.json of timm's hub next to the file applies, or
    else, without a note, the usual resize to 256 and crop of 224.
    """
    digest = sha256(path)
    models = importlib.import_module("torchvision.models")
    for weights in models.get_model_weights(name) if name in models.list_models() else ():
        if weights.url.endswith(f"-{digest[:8]}.pth"):
            preprocess = Preprocess.from_torchvision(weights.transforms())
            return preprocess, (f"preprocessing of torchvision's {weights}",)
    config = read_hub_config(path)
    return (Preprocess.from_timm(config), (FROM_HUB_CONFIG,)) if config else (Preprocess(), ())


def convert_torchvision_vgg(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert VGG-16 of torchvision; None for other files.

    The prefix `features.` of tensor names becomes `layers.`.
    """
    first_linear = file.tensors.get("classifier.0.weight")
    convolutions = [
        name for name, tensor in file.tensors.items() if name.startswith("features.") and tensor.dim() == 4
    ]
    if first_linear is None or first_linear.shape[1:] != (VGG_FLATTENED,) or not convolutions:
        return None
    if len(convolutions) != VGG_CONVOLUTIONS:
        raise WeightsError(
            f"{file.path}: a VGG with {len(convolutions)} convolutions; the catalog has only VGG-16, with 13"
        )
    batch_norm = "features.1.running_mean" in file.tensors
    preprocess, notes = published_preprocess("vgg16_bn" if batch_norm else "vgg16", file.path)
    return ConvertedWeights(
        description=f"VGG-16 of torchvision, {'with' if batch_norm else 'without'} batch norm",
        model="vgg16-bn" if batch_norm else "vgg16",
        tensors=rename_tensors(file, lambda name: name.replace("features.", "layers.")),
        num_classes=len(file.tensor("classifier.6.weight")),
        preprocess=preprocess,
        required={"pooling.kind": "flatten", "classifier": "mlp"},
        detected={"batch_norm": batch_norm},
        labels="imagenet",
        notes=notes,
    )


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
        model=depth_name("resnet", depth, 20),
        tensors=rename_tensors(
            file, lambda name: name.replace("linear.", "fc.").replace(".shortcut.", ".downsample.")
        ),
        num_classes=len(file.tensor("linear.weight")),
        preprocess=Preprocess(resize=CIFAR_SIDE, crop=CIFAR_SIDE),
        required={"depth": depth, "pooling.kind": "gap"},
        detected={
            "base_width": len(file.tensor("conv1.weight")),
            "shortcut": "projection" if projects else "pad",
        },
        labels="cifar10",
    )
