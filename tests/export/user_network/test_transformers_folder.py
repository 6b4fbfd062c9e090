"""A folder of `save_pretrained`: network, class names and rules come from its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sopdeploy.errors import WeightsError
from sopdeploy_commands.app import app
from sopdeploy_export.user_network.export_network import export_network
from sopdeploy_export.user_network.transformers_folder import (
    LOGITS,
    check_is_folder,
    open_folder,
)

LABELS = {0: "dress", 1: "hat", 2: "pants"}
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with random weights, as the Trainer of Transformers saves it."""
    library: Any = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = library.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=16,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    library.ViTForImageClassification(config).save_pretrained(path)
    processor = library.ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_everything_comes_from_the_folder(folder: Path, tmp_path: Path) -> None:
    opened = open_folder(folder)
    assert opened.labels == tuple(LABELS.values())
    with torch.no_grad():
        opened.network.classifier.weight.mul_(20)
    exported = export_network(
        opened.network,
        rebuild=opened.build,
        labels=opened.labels,
        transform=opened.transform,
        destination=tmp_path,
        name="vit",
        logits_key=LOGITS,
    )
    rules = exported.manifest.preprocess
    assert (rules.fit, rules.crop, rules.mean) == ("squash", SIDE, (0.5,) * 3)
    assert exported.certificate.pixels is not None
    assert exported.certificate.pixels.differences == ()
    assert exported.manifest.pixels == exported.certificate.pixels
    assert exported.certificate.statements["Pixels"] == "measured"


@pytest.mark.filterwarnings("ignore")
def test_weights_that_the_files_lack_are_not_drawn(folder: Path, tmp_path: Path) -> None:
    library: Any = pytest.importorskip("transformers")
    config = library.ViTConfig.from_pretrained(folder)
    library.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="classifier"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "names", [(), ("config.json",), ("model.safetensors",), ("config.json", "model.txt")]
)
def test_another_folder_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(WeightsError):
        check_is_folder(tmp_path)


@pytest.mark.parametrize(
    "options", [("--option", "depth=3"), ("--plain", "a:b"), ("--weights-key", "model")]
)
def test_options_of_a_builder_do_not_apply(options: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["export", str(tmp_path), "--network", "transformers", *options]
    )
    assert result.exit_code == 2
    assert options[0] in result.output
