"""The command `sopdeploy import`; hostile weight files end in one line and run no code."""

import json
import os
import pickle  # noqa: TID251
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sopdeploy.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy.cli.app import app
from tests.attacks.test_checkpoints import checkpoint
from tests.sopdeploy.importers.released import prefixed, state_of


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def small(folder: Path) -> Path:
    torch.save({"state_dict": prefixed(state_of("cifar A")), "best_prec1": 90.0}, folder / "small.th")
    return folder / "small.th"


def test_the_command_reports_what_it_found_and_mapped(tmp_path: Path) -> None:
    arguments = ["import", str(small(tmp_path)), "--as", "resnet8", "--out-file", str(tmp_path / "c.pt")]
    assert "mapped   44 tensors as resnet8" in run(*arguments).stdout
    report = json.loads(run(*arguments, "--json").stdout)
    stored = read_checkpoint(tmp_path / "c.pt")
    assert report["num_tensors"] == len(stored.weights)
    assert report["model"] == stored.model == "resnet8"
    assert stored.training["imported_project"] == "pytorch_resnet_cifar10"
    for change, message in {
        ("--out-file", arguments[1]): "is the file to import",
        ("--as", "resnet7"): "model 'resnet7' is not in the catalog",
    }.items():
        result = CliRunner().invoke(app, [*arguments, *change])
        assert result.exit_code == 2
        assert message in result.output


MARKER = "pwned"


class RunsACommand:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def saved(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file, **options)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data)


CODE = {"conv1.weight": torch.zeros(1), "x": RunsACommand()}

ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bare pickle": (written(pickle.dumps(RunsACommand())), "damaged or not a checkpoint"),
    "code in the state dict": (saved({"state_dict": CODE}), "refused"),
    "our checkpoint": (lambda file: write_checkpoint(file, checkpoint()), "already a sopdeploy checkpoint"),
    "unknown names": (saved({"encoder.weight": torch.zeros(2, 2)}), "encoder.weight"),
    "MATLAB 7.3": (written(b"MATLAB 7.3 MAT-file".ljust(512)), "save it in MATLAB with the option -v7"),
    "a huge header": (written(struct.pack("<Q", 1 << 62) + b"{" + bytes(64)), "damaged safetensors file"),
}


@pytest.mark.parametrize(("write", "message"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_one_line_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("weights.bin"))
    result = CliRunner().invoke(
        app, ["import", "weights.bin", "--as", "srsop-resnet18", "--out-file", "ckpt.pt"]
    )
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not Path(MARKER).exists()
    assert not Path("ckpt.pt").exists()
