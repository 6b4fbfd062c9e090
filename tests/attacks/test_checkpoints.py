"""Malicious and damaged checkpoints: each is rejected with one line and no code of it runs."""

import os
import pickle  # noqa: TID251
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sopdeploy.checkpoint import Checkpoint, load_plain, read_checkpoint, write_checkpoint
from sopdeploy.errors import CheckpointError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy_commands.app import app
from tests.support import quick_torch

MARKER = "pwned"


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread, and an empty folder in which malicious code would create its marker."""
    monkeypatch.chdir(tmp_path)
    with quick_torch.one_thread():
        yield


class Calls:
    """Pickled as a call of *function*."""

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


RUNS_COMMAND = Calls(os.system, f"touch {MARKER}")
RUNS_PYTHON = Calls(eval, f"open({MARKER!r}, 'w').close()")


def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    network = create_model("dsop-resnet8", num_classes=2, base_width=4)
    return Checkpoint(
        model="dsop-resnet8",
        config={"base_width": 4},
        weights=network.state_dict(),
        labels=("a", "b"),
        preprocess=Preprocess(resize=18, crop=16),
        training={},
    )


def content() -> dict[str, Any]:
    write_checkpoint(Path("whole.pt"), checkpoint())
    found: dict[str, Any] = load_plain(Path("whole.pt"), Path("whole.pt").read_bytes())
    return found


Write = Callable[[Path], object]


def pickled(value: Any) -> Write:
    return lambda path: path.write_bytes(pickle.dumps(value))


def saved(value: Any) -> Write:
    return lambda path: torch.save(value, path)


def with_training(value: Any, **options: Any) -> Write:
    return lambda path: torch.save({**content(), "training": {"epoch": value}}, path, **options)


def python_in_weights(path: Path) -> None:
    fields = content()
    fields["weights"]["fc.bias"] = RUNS_PYTHON
    torch.save(fields, path)


def module(path: Path) -> None:
    torch.save(create_model("dsop-resnet8", num_classes=2, base_width=4), path)


def cut(fraction: float) -> Write:
    def write(path: Path) -> None:
        write_checkpoint(path, checkpoint())
        body = path.read_bytes()
        path.write_bytes(body[: int(fraction * len(body))])

    return write


def escaping_names(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../" + MARKER, "x")
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
        archive.writestr("archive/version", "3")


ANOTHER_PROJECT = {
    "epoch": 90,
    "state_dict": {"fc.bias": torch.ones(4)},
    "best_acc1": torch.tensor(70.0),
}
UNSAFE, UNREADABLE, OTHER = (
    "could run code",
    "damaged|could run code",
    "not a sopdeploy checkpoint",
)
ATTACKS: dict[str, tuple[Write, str]] = {
    "a pickle that runs a command": (pickled(RUNS_COMMAND), "could run code|no checkpoint"),
    "a command in a checkpoint": (with_training(RUNS_COMMAND), UNSAFE),
    "Python code in the weights": (python_in_weights, UNSAFE),
    "a command in the legacy format": (
        with_training(RUNS_COMMAND, _use_new_zipfile_serialization=False),
        "no checkpoint",
    ),
    "a module": (module, UNSAFE),
    "a pickle of plain values": (pickled({"a": [1, 2, 3]}), "could run code|no checkpoint"),
    "a training state of another project": (saved(ANOTHER_PROJECT), OTHER),
    "the first half": (cut(0.5), "damaged|could run code|cannot be read"),
    "a zip with escaping names": (
        escaping_names,
        "damaged|could run code|not a sopdeploy checkpoint",
    ),
    "a zip bomb": (zip_bomb, UNREADABLE),
    "random bytes": (lambda path: path.write_bytes(bytes(range(7, 256)) * 50), UNREADABLE),
    "a folder": (lambda path: path.mkdir(), "a folder; use the best.pt"),
    "nothing": (lambda path: None, "no such file"),
    "a pipe": (lambda path: os.mkfifo(path), "not a checkpoint"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_checkpoints_are_rejected_and_run_no_code(attack: str) -> None:
    write, message = ATTACKS[attack]
    path = Path("ckpt.pt")
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith("ckpt.pt: ")
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(app, ["export", "ckpt.pt", "--detach", "--out", "bundles"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ckpt.pt: ")
    assert result.stderr.count("\n") == 1
    assert not Path("bundles").exists()
    assert not Path(MARKER).exists()


def test_the_attack_files_run_code_if_loaded_unsafely() -> None:
    pickled(RUNS_COMMAND)(Path("ckpt.pt"))
    pickle.loads(Path("ckpt.pt").read_bytes())  # noqa: S301
    assert Path(MARKER).exists()
