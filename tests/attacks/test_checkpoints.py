"""Attacks through the checkpoint: files that run code, pretend, or are broken.

Each is refused on one line, through the library and through the command line, and nothing of it is run.
"""

import collections
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
from sopdeploy.cli.app import app
from sopdeploy.errors import CheckpointError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model

MARKER = "pwned"


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a folder of its own in which code that runs leaves its marker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


class RunsACommand:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


class RunsPython:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({MARKER!r}, 'w').close()",)


class LooksUpAnAttribute:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("text", "upper")


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
    found: dict[str, Any] = load_plain(Path("whole.pt"))
    return found


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(RunsACommand()))


def inside_a_whole_checkpoint(path: Path) -> None:
    torch.save({**content(), "training": {"epoch": RunsACommand()}}, path)


def inside_the_weights(path: Path) -> None:
    whole = content()
    whole["weights"]["fc.bias"] = RunsPython()
    torch.save(whole, path)


def in_the_old_format(path: Path) -> None:
    torch.save(
        {**content(), "training": {"epoch": RunsACommand()}}, path, _use_new_zipfile_serialization=False
    )


def a_lookup_that_seems_harmless(path: Path) -> None:
    torch.save({**content(), "training": {"epoch": LooksUpAnAttribute()}}, path)


def a_whole_module(path: Path) -> None:
    torch.save(create_model("dsop-resnet8", num_classes=2, base_width=4), path)


def a_pickle_of_something_else(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": [1, 2, 3]}))


def a_pickle_of_a_path(path: Path) -> None:
    torch.save({**content(), "training": {"folder": Path("/etc")}}, path)


def state_dict_of_another_project(path: Path) -> None:
    torch.save(collections.OrderedDict({"module.conv1.weight": torch.ones(4, 3, 3, 3)}), path)


def training_state_of_another_project(path: Path) -> None:
    torch.save({"epoch": 90, "state_dict": {"fc.bias": torch.ones(4)}, "best_acc1": torch.tensor(70.0)}, path)


def a_bare_tensor(path: Path) -> None:
    torch.save(torch.ones(3), path)


def a_scripted_network(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/code/model.py", f"open({MARKER!r}, 'w')")
        archive.writestr("archive/version", "3")


def cut(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_checkpoint(path, checkpoint())
        body = path.read_bytes()
        path.write_bytes(body[: int(share * len(body))])

    return write


def damaged_records(path: Path) -> None:
    """The zip is whole, its pickle is not."""
    write_checkpoint(path, checkpoint())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body[: len(body) // 2] if name.endswith("data.pkl") else body)


def records_left_out(path: Path) -> None:
    """The pickle is whole, the numbers it speaks of are not there."""
    write_checkpoint(path, checkpoint())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in members.items():
            if "/data/" not in name:
                archive.writestr(name, body)


def names_that_climb(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../" + MARKER, "x")
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def a_zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
        archive.writestr("archive/version", "3")


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle that runs a command": (bare_pickle, "could run code|not a checkpoint"),
    "a command inside a whole checkpoint": (inside_a_whole_checkpoint, "could run code"),
    "Python code inside the weights": (inside_the_weights, "could run code"),
    "a command in the old format": (in_the_old_format, "could run code"),
    "a lookup that seems harmless": (a_lookup_that_seems_harmless, "could run code"),
    "a whole module": (a_whole_module, "could run code"),
    "a path object": (a_pickle_of_a_path, "could run code"),
    "a pickle of something else": (a_pickle_of_something_else, "could run code|not a.* checkpoint"),
    "a state dict of another project": (state_dict_of_another_project, "not a sopdeploy checkpoint"),
    "a training state of another project": (
        training_state_of_another_project,
        "not a sopdeploy checkpoint",
    ),
    "a bare tensor": (a_bare_tensor, "not a sopdeploy checkpoint"),
    "a scripted network": (a_scripted_network, "could run code|damaged or not a checkpoint"),
    "a file cut in the middle": (cut(0.5), "damaged|could run code|cannot be read"),
    "a file without its end": (cut(0.99), "damaged|could run code"),
    "a file of its first bytes": (cut(0.001), "damaged|could run code"),
    "a damaged pickle in a whole zip": (damaged_records, "damaged|could run code"),
    "numbers left out": (records_left_out, "damaged|could run code"),
    "a zip with names that climb": (names_that_climb, "damaged|could run code|not a sopdeploy checkpoint"),
    "a zip bomb": (a_zip_bomb, "damaged|could run code"),
    "random bytes": (lambda path: path.write_bytes(bytes(range(7, 256)) * 50), "could run code|damaged"),
    "text": (lambda path: path.write_text("sopdeploy-checkpoint 1\n" * 30), "could run code|damaged"),
    "an empty file": (lambda path: path.write_bytes(b""), "damaged|could run code"),
    "a folder": (lambda path: path.mkdir(), "no such file"),
    "nothing": (lambda path: None, "no such file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "a pipe": (lambda path: os.mkfifo(path), "no such file"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_is_no_plain_checkpoint_is_refused_and_nothing_is_run(attack: str) -> None:
    write, message = ATTACKS[attack]
    path = Path("ckpt.pt")
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith("ckpt.pt: ")
    assert "\n" not in str(caught.value)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_command_line_refuses_it_on_one_line_and_writes_nothing(attack: str) -> None:
    Path("ckpt.pt").unlink(missing_ok=True)
    ATTACKS[attack][0](Path("ckpt.pt"))
    found = CliRunner().invoke(app, ["export", "ckpt.pt", "--detach", "--out", "bundles"])
    assert found.exit_code == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: ckpt.pt: ")
    assert found.stderr.count("\n") == 1
    assert not Path("bundles").exists()
    assert not Path(MARKER).exists()


def test_the_files_that_run_code_would_run_it_where_they_are_trusted() -> None:
    """The attacks are real: the same file, read the unsafe way, leaves its marker."""
    bare_pickle(Path("ckpt.pt"))
    pickle.loads(Path("ckpt.pt").read_bytes())  # noqa: S301
    assert Path(MARKER).exists()
