"""VGG-16 of torchvision, with and without batch norm: names, logits, and a start for other poolings."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.conversion import WeightFile
from sopdeploy.importers.import_weights import convert_weights
from sopdeploy.models.registry import create_model
from sopdeploy.training.start_weights import StartWeights, load_start_weights
from tests.sopdeploy.importers.released import assert_logits, images_of, imported, settled

NETWORKS = [("vgg16", "vgg16"), ("vgg16_bn", "vgg16-bn")]


def vgg_file(tmp_path: Path, name: str) -> WeightFile:
    """Describe a file of torchvision's network *name* with five classes, without its values."""
    (tmp_path / "a.pth").touch()
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(num_classes=5).state_dict()
    return WeightFile(path=tmp_path / "a.pth", sha256="", tensors=state)


@pytest.mark.parametrize(("name", "model"), NETWORKS)
def test_every_tensor_of_torchvision_has_a_place(tmp_path: Path, name: str, model: str) -> None:
    project, converted = convert_weights(vgg_file(tmp_path, name), model)
    with torch.device("meta"):
        expected = create_model(model, num_classes=5).state_dict()
    assert (project, converted.model, converted.num_classes) == ("torchvision", model, 5)
    found = {mapped.name: mapped.tensor.shape for mapped in converted.tensors}
    assert found == {name: tensor.shape for name, tensor in expected.items()}


def test_a_vgg_of_another_depth_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="a VGG with 16 convolutions; the catalog has only VGG-16, with 13"
    ):
        convert_weights(vgg_file(tmp_path, "vgg19_bn"), "vgg16-bn")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), NETWORKS)
def test_torchvision_weights_give_the_same_logits(tmp_path: Path, name: str, model: str) -> None:
    network = settled(getattr(torchvision.models, name)(num_classes=5))
    torch.save(network.state_dict(), tmp_path / "a.pth")
    ours, report = imported(tmp_path / "a.pth", model)
    with torch.no_grad():
        assert_logits(ours, network.double()(images_of(64)), images_of(64))
    assert report.config.get("batch_norm", True) == name.endswith("_bn")


@pytest.mark.parametrize(
    ("model", "config", "new"),
    [
        ("vgg16-bn", {"pooling": {"kind": "isqrt", "width": 8}}, {"classifier.0", "classifier.6"}),
        ("vgg16-bn", {"pooling": "bcnn", "classifier": "linear"}, {"classifier"}),
    ],
)
def test_the_convolutions_start_a_network_with_another_pooling(
    tmp_path: Path, model: str, config: dict[str, Any], new: set[str]
) -> None:
    _, converted = convert_weights(vgg_file(tmp_path, "vgg16_bn"), "vgg16-bn")
    values = {  # ones without memory of their own
        mapped.name: torch.ones((), dtype=mapped.tensor.dtype).expand(mapped.tensor.shape)
        for mapped in converted.tensors
    }
    weights = StartWeights(file="a.pth", sha256="", network="VGG-16", tensors=values, preprocess=Preprocess())
    network = create_model(model, num_classes=3, **config)
    report = load_start_weights(weights, network, ("a", "b", "c"))
    assert {part for part in report.new if not part.startswith("pooling")} == new
    convolutions = [tensor for name, tensor in network.state_dict().items() if name.startswith("layers.")]
    assert all(bool((tensor == 1).all()) for tensor in convolutions)
