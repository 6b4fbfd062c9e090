"""A network with ImageNet weights and real photographs, for tests of what users bring."""

from pathlib import Path

import pytest
import torch

from sopdeploy.weights.conversion import WeightFile
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.import_weights import convert_weights, open_weights
from sopdeploy.weights.published import find_lite_weights

LITE0 = "timm:tf_efficientnet_lite0"
PHOTOS = Path(__file__).parent / "photos"


@pytest.fixture(scope="session")
def lite0_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0 with ImageNet weights, a state dict with timm's names."""
    found = find_lite_weights("efficientnet-lite0")
    assert found is not None
    weights = open_weights(check_is_weights(found))
    assert isinstance(weights, WeightFile)
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(dict(convert_weights(weights, "efficientnet-lite0").tensors), path)
    return path


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of real photographs, eight for each of four classes."""
    return PHOTOS
