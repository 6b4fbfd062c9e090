"""The command `sopdeploy import`; hostile weight files end in one line and run no code."""

import json
import os
import pickle  # noqa: TID251
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sopdeploy.errors import SopdeployError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.import_weights import open_weights
from sopdeploy_commands.app import app
from tests.sopdeploy.weights.released import prefixed, state_of


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def small(folder: Path) -> Path:
    torch.save(
        {"state_dict": prefixed(state_of("cifar A")), "best_prec1": 90.0}, folder / "small.th"
    )
    return folder / "small.th"


def test_the_command_reports_what_it_found_and_mapped(tmp_path: Path) -> None:
    arguments = [
        "import",
        str(small(tmp_path)),
        "--as",
        "resnet8",
        "--out-file",
        str(tmp_path / "c.pt"),
    ]
    assert "44 tensors" in run(*arguments).stdout

    report = json.loads(run(*arguments, "--json").stdout)
    stored = read_checkpoint(tmp_path / "c.pt")
    assert report["num_tensors"] == len(stored.weights)
    assert report["model"] == stored.model == "resnet8"
    assert stored.training["imported_project"] == "pytorch_resnet_cifar10"
    for change, message in {
        ("--out-file", arguments[1]): "--out-file",
        ("--as", "resnet7"): "'resnet7'",
    }.items():
        result = CliRunner().invoke(app, [*arguments, *change])
        assert result.exit_code == 2
        assert message in result.output


MARKER = "pwned"
OURS = Checkpoint(
    model="resnet8",
    config={},
    weights={},
    labels=("a", "b"),
    preprocess=Preprocess(),
    training={},
)


class RunsACommand:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def saved(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file, **options)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data)


CODE = {"conv1.weight": torch.zeros(1), "x": RunsACommand()}


def deflated(file: Path) -> None:
    """A checkpoint of 256 MB of zeros, compressed to a quarter of a megabyte."""
    torch.save({"conv1.weight": torch.zeros(4)}, file)
    entries = {}
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            with archive.open(name, "w") as entry:
                for _ in range(256 if name.endswith("data/0") else 1):
                    entry.write(bytes(1 << 20) if name.endswith("data/0") else content)


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bare pickle": (written(pickle.dumps(RunsACommand())), "damaged"),
    "code in the state dict": (saved({"state_dict": CODE}), "refused"),
    "our checkpoint": (
        lambda file: write_checkpoint(file, OURS),
        "already a sopdeploy checkpoint",
    ),
    "unknown names": (saved({"encoder.weight": torch.zeros(2, 2)}), "encoder.weight"),
    "a deflated checkpoint": (deflated, "damaged"),
    "a huge header": (
        written(struct.pack("<Q", 1 << 62) + b"{" + bytes(64)),
        "damaged safetensors file",
    ),
}


@pytest.mark.slow
def test_what_expands_is_refused_before_it_does(tmp_path: Path) -> None:
    write, message = ATTACKS["a deflated checkpoint"]
    write(tmp_path / "weights.bin")
    tracemalloc.start()

    with pytest.raises(SopdeployError, match=message):
        open_weights(check_is_weights(tmp_path / "weights.bin"))

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32_000_000


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
