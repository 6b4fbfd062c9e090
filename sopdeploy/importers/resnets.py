"""ResNets of torchvision, and of whoever keeps its names (timm's plain ResNets do).

torchvision publishes some networks twice, measured on pictures prepared differently. Its files are known
by their hash; for others a card of timm's hub beside the file counts, else the usual 256, 224.
"""

import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from torch import Tensor

from sopdeploy.backbones.resnet import BLOCKS, STAGES
from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.source import Translation, WeightFile, renamed

BASIC = {18, 34}
PARTS = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01])|fc)\.[a-z_]+")


def is_part(name: str) -> bool:
    """Say whether *name* is that of a tensor of a ResNet for 224-pixel images."""
    return PARTS.fullmatch(name) is not None


def resnet_depth(path: Path, names: Iterable[str]) -> int:
    """Return the depth of the ResNet whose tensors have these *names*; raises `WeightsError`."""
    names = set(names)
    counts = tuple(blocks_of(names, stage) for stage in STAGES)
    basic = "layer1.0.conv3.weight" not in names
    for depth, blocks in BLOCKS.items():
        if blocks == counts and (depth in BASIC) == basic:
            return depth
    kind = "basic blocks" if basic else "bottlenecks"
    raise WeightsError(f"{path}: a ResNet of {counts} {kind} is not in the catalog")


def blocks_of(names: Iterable[str], stage: str) -> int:
    """Return how many blocks *stage* has."""
    positions = {name.split(".")[1] for name in names if name.startswith(f"{stage}.")}
    return len(positions)


def tensor(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the tensor *name*; raises `WeightsError` where the file has none."""
    if name not in tensors:
        raise WeightsError(f"{path}: has no {name}; give the file of a whole network")
    return tensors[name]


def matrix(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the classifier's weight *name*, (classes, features); raises `WeightsError`."""
    found = tensor(path, tensors, name)
    if found.dim() != 2:
        raise WeightsError(f"{path}: {name} is {tuple(found.shape)}, not (classes, features)")
    return found


PARTS_CIFAR_RESNET = re.compile(
    r"(conv1|bn1|layer[123]\.\d+\.(conv[12]|bn[12]|downsample\.[01])|fc)\.[a-z_]+"
)
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
    return ours if PARTS_CIFAR_RESNET.fullmatch(ours) else None


CARD = "config.json"
MOST_BYTES = 1 << 16
FROM_CARD = f"preprocessing from {CARD} beside the file"


def read_card(weights: Path) -> Mapping[str, Any]:
    """Return what the card beside *weights* says of preprocessing, nothing where there is none."""
    path = weights.with_name(CARD)
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = card.get("pretrained_cfg") if isinstance(card, dict) else None
    return found if isinstance(found, dict) else {}


def preprocess_of(path: Path, card: Mapping[str, Any]) -> Preprocess:
    """Return timm's evaluation of *card*: the crop's share of the shorter side, mean, deviation."""
    if card.get("crop_mode", "center") != "center":
        raise WeightsError(f"{path}: timm crops {card['crop_mode']!r} for it, which has no form here")
    try:
        crop = int(card["input_size"][-1])
        return Preprocess(
            resize=max(crop, math.floor(crop / float(card["crop_pct"]))),
            crop=crop,
            interpolation=card["interpolation"],
            mean=tuple(card["mean"]),
            std=tuple(card["std"]),
        )
    except (
        pydantic.ValidationError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        ZeroDivisionError,
    ) as problem:
        raise WeightsError(
            f"{path}: timm's preprocessing of it has no form here; see {CARD} beside it"
        ) from problem


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
