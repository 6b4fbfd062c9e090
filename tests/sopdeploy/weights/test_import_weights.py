"""ResNets and VGGs of torchvision, timm and for CIFAR, as `.pth` and as safetensors."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet

from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.models.registry import create_model
from sopdeploy.weights import pytorch_projects
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy.weights.conversion import WeightFile
from sopdeploy.weights.import_weights import convert_weights
from tests.sopdeploy.weights.released import (
    SHORT,
    assert_logits,
    assert_released_logits,
    images_of,
    imported,
    prefixed,
    settled,
    state_of,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HUB = {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


@functools.cache
def torchvision_resnet18(classes: int = 5) -> torch.nn.Module:
    return settled(TorchvisionResNet(BasicBlock, list(SHORT), num_classes=classes))


def write_hub_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": config}))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the weights of a short torchvision ResNet-18 with five classes."""
    file = tmp_path_factory.mktemp("torchvision") / "a.pth"
    torch.save(torchvision_resnet18().state_dict(), file)
    return file


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """Save the weights of a narrow CIFAR ResNet-8 with five classes."""
    torch.save(state_of("cifar A narrow"), tmp_path / "a.th")
    return tmp_path / "a.th"


SAVE_FILE = safetensors.torch.save_file


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("save", "dtype"),
    [
        pytest.param(torch.save, torch.float32, marks=pytest.mark.slow),
        (SAVE_FILE, torch.float16),
    ],
)
def test_torchvision_weights_give_the_same_logits(
    tmp_path: Path, save: Callable[..., None], dtype: torch.dtype
) -> None:
    network = copy.deepcopy(torchvision_resnet18()).to(dtype)
    file = tmp_path / "weights"
    save(network.state_dict(), file)
    ours, report = imported(file, "resnet18")
    with torch.no_grad():
        assert_logits(ours, network.double()(images_of(64)), images_of(64))

    assert report.looks_like == "ResNet-18 of torchvision"
    assert (report.preprocess.resize, report.preprocess.crop) == (256, 224)
    assert (report.preprocess.mean, report.preprocess.std) == IMAGENET


@pytest.mark.parametrize(
    ("depth", "digest", "resize"),
    [
        (18, "f37072fd", 256),
        (50, "0676ba61", 256),
        (50, "11ad3fa6", 232),
        (101, "cd907fc2", 232),
    ],
)
def test_torchvision_files_are_identified_by_their_hash(
    depth: int, digest: str, resize: int
) -> None:
    file = WeightFile(path=Path("a.pth"), sha256=digest + "0" * 56, tensors={})
    found, notes = pytorch_projects.find_preprocess(f"resnet{depth}", file)

    assert found.resize == resize
    assert found.crop == 224
    assert found.interpolation == "bilinear"
    assert notes[0].startswith("preprocessing of torchvision's")


@pytest.mark.usefixtures("short")
def test_a_thousand_classes_get_the_imagenet_names_and_unknown_depths_are_refused(
    tmp_path: Path,
) -> None:
    torch.save(torchvision_resnet18(1000).state_dict(), tmp_path / "a.pth")
    _, report = imported(tmp_path / "a.pth", "resnet18")
    assert report.labels.startswith("ImageNet")

    with torch.device("meta"):
        names = torchvision.models.resnet152().state_dict()
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "a.pth")

    with pytest.raises(WeightsError, match=r"ResNet of \(3, 8, 36, 3\)"):
        imported(tmp_path / "a.pth", "resnet101")


@pytest.mark.parametrize("beside", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_timm_weights_with_and_without_hub_config(tmp_path: Path, beside: bool) -> None:
    network = settled(timm.create_model("test_resnet", num_classes=5))
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    if beside:
        write_hub_config(tmp_path, {"input_size": [3, 288, 288], **HUB})
    ours, report = imported(file, "timm:test_resnet")
    with torch.no_grad():
        assert_logits(ours, network.double()(images_of(64)), images_of(64))
    rules = report.preprocess
    stored = timm.get_pretrained_cfg("test_resnet")
    side = stored.input_size[-1]
    expected = (
        (320, 288, "bicubic")
        if beside
        else (int(side / stored.crop_pct), side, stored.interpolation)
    )

    assert (rules.resize, rules.crop, rules.interpolation) == expected
    assert rules.mean == ((0.5,) * 3 if beside else stored.mean)
    assert report.notes[0].startswith(
        "preprocessing from config.json" if beside else "no config.json"
    )


@pytest.mark.parametrize("model", ["resnet18", "timm:test_vit"])
def test_a_file_of_another_network_names_the_network_that_it_fits(
    tmp_path: Path, model: str
) -> None:
    file = tmp_path / "test_efficientnet-epoch9.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=3).state_dict(), file)
    with pytest.raises(WeightsError) as error:
        imported(file, model)

    fits = "it has the tensors of timm:test_efficientnet, so name that network"
    assert str(error.value) == f"{file}: does not fit {model}; {fits}"


@pytest.mark.parametrize(
    ("released", "model"),
    [("cifar A", "resnet8"), ("cifar A 20", "resnet20"), ("cifar B", "resnet8")],
)
def test_cifar_weights_give_the_same_logits(tmp_path: Path, released: str, model: str) -> None:
    torch.save(
        {"state_dict": prefixed(state_of(released)), "best_prec1": 91.7}, tmp_path / "a.th"
    )
    ours, report = imported(tmp_path / "a.th", model)

    assert_released_logits(ours, released)
    assert (report.preprocess.resize, report.preprocess.crop) == (32, 32)
    assert report.labels == "the classes of pytorch_resnet_cifar10"
    assert (report.preprocess.mean, report.preprocess.std) == IMAGENET
    assert report.config["shortcut"] == ("projection" if released == "cifar B" else "pad")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet20", r"depth .*--as resnet18"), ("isqrt-resnet50", r"depth is 50, not 18")],
)
def test_another_network_is_refused(weights: Path, name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        imported(weights, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": torch.zeros(2)}, "extra.weight"),
        (
            {"layer1.0.conv1.weight": torch.zeros(8, 8, 1, 1)},
            r"\(8, 8, 1, 1\), not \(8, 8, 3, 3\)",
        ),
        ({"bn1.bias": torch.full((8,), float("nan"))}, "bn1.bias .*not finite"),
        ({"bn1.bias": torch.zeros(1).expand(1 << 31)}, "more than 4 GiB"),
        ({"bn1.bias": None}, "bn1.bias is missing"),
        ({"module.bn1.bias": torch.zeros(16)}, "module.bn1.bias"),
        ({"bn1._orig_mod.bias": torch.zeros(16)}, "bn1._orig_mod.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state = state_of("cifar A narrow") | change
    torch.save(
        {name: value for name, value in state.items() if value is not None}, tmp_path / "a.th"
    )

    with pytest.raises(WeightsError, match=message):
        imported(tmp_path / "a.th", "resnet8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preprocess": {"resize": 20}}, r"crop \(32\)"),
        ({"settings": {"depht": 18}}, "depht: "),
    ],
)
def test_an_invalid_option_is_refused(narrow: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        imported(narrow, "resnet8", **options)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("n.txt", "a\nb\n", "2 names"), ("n.json", "{}", "list of names")],
)
def test_an_invalid_file_of_labels_is_refused(
    narrow: Path, name: str, content: str, said: str
) -> None:
    labels = narrow.with_name(name)
    labels.write_text(content)

    with pytest.raises(ConfigError, match=said):
        imported(narrow, "resnet8", labels=labels)


@pytest.mark.parametrize(
    ("name", "content"), [("n.txt", "a\n b \nc\n\nd\ne"), ("n.json", '["a","b","c","d","e"]')]
)
def test_the_input_size_and_the_labels_can_be_given(
    narrow: Path, name: str, content: str
) -> None:
    labels = narrow.with_name(name)
    labels.write_text(content)
    given = {"resize": 448, "crop": 448, "interpolation": "bicubic"}
    rules = imported(narrow, "resnet8", labels=labels, preprocess=given)[1].preprocess

    assert rules.resize == 448
    assert rules.crop == 448
    assert rules.interpolation == "bicubic"
    assert rules.mean == IMAGENET[0]
    assert read_checkpoint(narrow.with_name("imported.pt")).labels == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    ("classes", "message"), [("acbde", ""), ("abcd", "4 names for 5 classes")]
)
def test_the_labels_of_a_file_are_those_of_its_class_to_idx(
    narrow: Path, classes: str, message: str
) -> None:
    numbers = {name: number for number, name in enumerate(classes)}
    torch.save({"model": state_of("cifar A narrow"), "class_to_idx": numbers}, narrow)
    if message:
        with pytest.raises(ConfigError, match=message):
            imported(narrow, "resnet8")
    else:
        assert imported(narrow, "resnet8")[1].labels == f"class_to_idx of {narrow}"
        assert read_checkpoint(narrow.with_name("imported.pt")).labels == tuple(classes)


NETWORKS = [("vgg16", "vgg16"), ("vgg16_bn", "vgg16-bn")]


def vgg_file(tmp_path: Path, name: str) -> WeightFile:
    """Describe a file of torchvision's network *name* with five classes, without its values."""
    (tmp_path / "a.pth").touch()
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(num_classes=5).state_dict()
    return WeightFile(path=tmp_path / "a.pth", sha256="", tensors=state)


@pytest.mark.parametrize(("name", "model"), NETWORKS)
def test_every_tensor_of_torchvision_has_a_place(tmp_path: Path, name: str, model: str) -> None:
    converted = convert_weights(vgg_file(tmp_path, name), model)
    with torch.device("meta"):
        expected = create_model(model, num_classes=5).state_dict()

    assert converted.project == "torchvision"
    assert converted.model == model
    assert converted.num_classes == 5

    found = {name: tensor.shape for name, tensor in converted.tensors.items()}
    assert found == {name: tensor.shape for name, tensor in expected.items()}
