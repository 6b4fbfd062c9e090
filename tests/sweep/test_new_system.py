"""A new network needs one file, one catalog entry and one golden; this module is such a file."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from sopdeploy import describe
from sopdeploy.backbones.base import Backbone
from sopdeploy.config import StrictModel
from sopdeploy.models.base import Classifier, Entry, TrainingOutput
from sopdeploy.models.registry import CATALOG
from tests.sweep.steps import Small, exported

NAME = "made-up"
SMALL = Small(NAME, 8)


class MadeUpConfig(StrictModel):
    """The number of channels."""

    width: int = 5


class Plain(Backbone):
    """A convolution, an average, a linear layer."""

    config: MadeUpConfig

    def __init__(self, config: MadeUpConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.conv = nn.Conv2d(3, config.width, 3)
        self.fc = nn.Linear(config.width, num_classes)

    def feature_maps(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, list[Tensor]]:
        return self.conv(images).relu(), []

    def classify(self, features: Tensor) -> Tensor:
        return self.fc(features.mean(dim=(2, 3)))


class MadeUp(Classifier, Plain):
    """`Plain` with a training-only second head on the maxima."""

    training_only = ("helper",)
    inference_class = Plain

    def __init__(self, config: MadeUpConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.helper = nn.Linear(config.width, num_classes)

    def forward(self, images: Tensor) -> Any:
        if not self.training:
            return super().forward(images)
        features, _ = self.feature_maps(images)
        return TrainingOutput(self.classify(features), {"helper": self.helper(features.amax(dim=(2, 3)))}, {})

    def loss_weights(self) -> dict[str, float]:
        return {"main": 1.0, "helper": 0.5}


@pytest.fixture(autouse=True)
def _in_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Entry(
        network=MadeUp, config=MadeUpConfig, defaults={}, image_size=8, num_classes=3, summary="made up"
    )
    monkeypatch.setitem(CATALOG, NAME, line)


def test_it_is_described() -> None:
    found = describe(NAME, width=7)
    assert found.training.parameters - found.shipped.parameters == 3 * (7 + 1)
    assert found.parts.keys() == {"conv", "fc", "helper.weight", "helper.bias"}
    assert (found.training_only, found.representation) == (("helper",), 7)


def test_it_is_trained_detached_certified_and_exported(tmp_path: Path) -> None:
    found = exported(SMALL.trained(tmp_path / "ckpt.pt"), tmp_path / "bundles")
    assert found.parity.passed
    assert found.certificate.detached == ("helper",)
    assert {entry.name for entry in found.certificate.removed} == {"helper.weight", "helper.bias"}
