"""The command `sopdeploy import`."""

import json
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.cli.app import app
from tests.sopdeploy.importers.released import prefixed, state_of


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def small(folder: Path) -> Path:
    torch.save({"state_dict": prefixed(state_of("cifar A")), "best_prec1": 90.0}, folder / "small.th")
    return folder / "small.th"


def test_the_command_reports_what_it_found_mapped_and_ignored(tmp_path: Path) -> None:
    arguments = ["import", str(small(tmp_path)), "--as", "resnet8", "--out-file", str(tmp_path / "c.pt")]
    output = run(*arguments).stdout
    for text in (
        "found    ResNet-8 for CIFAR of pytorch_resnet_cifar10",
        "mapped   44 tensors as resnet8",
        "ignored  best_prec1",
        "resize 32, crop 32",
        "classes  10: CIFAR-10",
    ):
        assert text in output
    report = json.loads(run(*arguments, "--json").stdout)
    stored = read_checkpoint(tmp_path / "c.pt")
    assert report["num_tensors"] == len(stored.weights)
    assert report["model"] == stored.model == "resnet8"
    assert report["sha256"] == stored.training["imported_sha256"]
    assert report["beside"] == ["best_prec1"]
    for change, message in {
        ("--out-file", arguments[1]): "is the file to import",
        ("--as", "resnet7"): "model 'resnet7' is not in the catalog",
    }.items():
        result = CliRunner().invoke(app, [*arguments, *change])
        assert result.exit_code == 2
        assert message in result.output
