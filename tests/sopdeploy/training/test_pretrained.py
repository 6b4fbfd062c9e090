"""`sopdeploy.create_model` with and without pretrained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sopdeploy
from sopdeploy.errors import ConfigError, SopdeployError, WeightsError
from sopdeploy.images.preprocess import Preprocess

NARROW = {"base_width": 16}  # channels of the first stage


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    """The tensors of a narrow ResNet-18 of three classes."""
    torch.manual_seed(1)
    return sopdeploy.create_model("resnet18", 3, **NARROW).state_dict()


@pytest.fixture(scope="module")
def weights(stored: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with torchvision's layout that has these tensors."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(stored, path)
    return path


LOADED = {
    "no weights": ("resnet18", 3, {}, False, False),
    "as many classes": ("resnet18", 3, {}, True, True),
    "other classes": ("resnet18", 7, {}, True, False),
    "another pooling": ("resnet18", 3, {"pooling": "isqrt"}, True, False),
    "branches": ("dsop-resnet18", 3, {"aux_blocks": (1, 1, 1, 1)}, True, True),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_the_file_has_is_loaded(
    case: str, weights: Path, stored: dict[str, torch.Tensor]
) -> None:
    name, classes, options, loads, loads_classifier = LOADED[case]
    pretrained: Any = weights if loads else False
    network = sopdeploy.create_model(name, classes, pretrained=pretrained, **NARROW, **options)

    tensors = network.state_dict()
    assert torch.equal(tensors["conv1.weight"], stored["conv1.weight"]) == loads
    same_shape = tensors["fc.weight"].shape == stored["fc.weight"].shape
    is_loaded = same_shape and torch.equal(tensors["fc.weight"], stored["fc.weight"])
    assert is_loaded == loads_classifier
    assert network.preprocess == (Preprocess() if loads else None)
    assert network.training


WRONG = {
    "another network": ("resnet34", WeightsError, r"^pretrained: .*not fit"),
    "no published weights": ("resnet20", ConfigError, r"^pretrained: no ImageNet"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_argument(case: str, weights: Path) -> None:
    name, kind, message = WRONG[case]
    options = NARROW if name == "resnet34" else {}
    pretrained: Any = weights if name == "resnet34" else True

    with pytest.raises(kind, match=message) as error:
        sopdeploy.create_model(name, 3, pretrained=pretrained, **options)
    assert isinstance(error.value, SopdeployError)
    assert "weights" not in error.value.remedies


@pytest.mark.parametrize(
    ("pattern", "number"), [("gsop*", 8), ("*-resnet8", 1), ("none*", 0), ("RESNET8", 0)]
)
def test_networks_are_listed_by_a_pattern(pattern: str, number: int) -> None:
    names = sopdeploy.list_models(pattern)
    assert len(names) == number
    assert set(names) <= set(sopdeploy.list_models())
