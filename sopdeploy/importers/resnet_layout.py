"""Which ResNet a state dict under torchvision's names is: its depth by its blocks, its classes by its end."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sopdeploy.backbones.resnet import BLOCKS, STAGES
from sopdeploy.errors import WeightsError

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
