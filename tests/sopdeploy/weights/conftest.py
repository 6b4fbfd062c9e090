"""Shortened ResNets for weight files whose depth does not matter."""

import pytest

from sopdeploy.models.backbones.resnet import BLOCKS
from tests.sopdeploy.weights.released import SHORT


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the ResNets 18 and 50 to five blocks."""
    for depth in (18, 50):
        monkeypatch.setitem(BLOCKS, depth, SHORT)


@pytest.fixture
def short26(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten ResNet-26 alone: importers tell bottleneck networks apart by their blocks."""
    monkeypatch.setitem(BLOCKS, 26, SHORT)
