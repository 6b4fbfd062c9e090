"""Errors before and during a run, numbers that are not finite, and the files that remain."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from sopdeploy.base.files import LOCK
from sopdeploy.data.photos.file_checks import hash_images
from sopdeploy.errors import ConfigError, DataError, StorageError, TrainingError
from sopdeploy.training import division
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.division import open_division
from sopdeploy.training.loop import gradient
from sopdeploy.training.loop.losses import Loss
from sopdeploy.training.loop.state import LoopState
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.data.folders.test_folder import make
from tests.sopdeploy.training.runs import RecordingCallback, interrupt, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

ONE = ("epochs=1", "data={kind='folder'}", "batch_size=4")
NAN = torch.tensor(float("nan"))


def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken").symlink_to("nothing")
    for out in (tmp_path, tmp_path / "notes.txt", tmp_path / "broken"):
        with pytest.raises(ConfigError, match="empty folder"):
            train_recipe(short_recipe(), out)

    with pytest.raises(StorageError, match=r"notes\.txt"):
        train_recipe(short_recipe(), tmp_path / "notes.txt" / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "broken"}


def test_an_empty_folder_is_used_and_a_run_is_never_overwritten(tmp_path) -> None:
    assert train_recipe(short_recipe("epochs=1"), tmp_path).out == tmp_path

    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"resume='always'"):
        train_recipe(short_recipe("epochs=1"), tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


@contextmanager
def locked_by_another_process(path):
    code = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, 2); print(flush=True); input()"
    command = [sys.executable, "-S", "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.kill()


def test_two_processes_never_train_in_the_same_folder(tmp_path) -> None:
    recipe, out, message = (
        short_recipe("epochs=1"),
        tmp_path / "run",
        "another process",
    )
    out.mkdir()
    with locked_by_another_process(out / LOCK):
        for resume in (False, "auto"):
            with pytest.raises(ConfigError, match=message):
                train_recipe(recipe, out, resume=resume)

    # Of the killed process, which no longer locks it
    assert [path.name for path in out.iterdir()] == [LOCK]

    interrupt(recipe, out, "step", 0, 0)
    with locked_by_another_process(out / LOCK), pytest.raises(ConfigError, match=message):
        train_recipe(recipe, out, resume=True)
    assert train_recipe(recipe, out, resume=True).num_epochs == 1
    assert not (out / LOCK).exists()


def test_a_run_that_another_process_began_meanwhile_is_not_overwritten(tmp_path) -> None:
    ours, other = (RunFolder(tmp_path / "run", Strategy(torch.device("cpu"))) for _ in range(2))
    assert ours.open(resume="auto") is other.open(resume="auto") is None

    other.lock()
    other.last.write_bytes(b"run")
    other.unlock()

    with pytest.raises(ConfigError, match="holds a run"):
        ours.lock()

    ours.unlock()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (lambda: short_recipe(), {"resume": True}, "holds no run"),
        (lambda: short_recipe("device=cuda"), {}, "no CUDA device"),
        (lambda: read_recipe("photos-dsop"), {}, r"data\.path: not set"),
        (
            lambda: read_recipe("digits-plain", ["model.name=alexnet"]),
            {},
            "16 pixels",
        ),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(
    tmp_path, monkeypatch, recipe, options, message
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        train_recipe(recipe(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stopped(tmp_path):
    """Return the parent of `run`, stopped in its first epoch, and of its `images`."""
    make(tmp_path / "images", a=5, b=5)
    interrupt(
        short_recipe(*ONE, f"data.path={tmp_path / 'images'}"), tmp_path / "run", "step", 0, 0
    )
    return tmp_path


def test_a_run_is_resumed_with_the_same_recipe_only(stopped) -> None:
    changes = {
        "seed=1": "seed = 0, now it is 1",
        "optimizer.lr=0.5": "optimizer.lr = 0.1, now it is 0.5",
        "epochs=9": "epochs = 1, now it is 9",
        "model.config.base_width=8": "model.config.base_width = 4, now it is 8",
        "schedule={kind='milestones'}": "schedule.gamma = None, now it is 0.1",
    }
    for override, message in changes.items():
        recipe = short_recipe(*ONE, f"data.path={stopped / 'images'}", override)
        with pytest.raises(ConfigError, match=f"started with {message}"):
            train_recipe(recipe, stopped / "run", resume=True)


def test_a_run_goes_on_if_an_option_reads_its_folder_now(stopped) -> None:
    make(stopped / "images", unsorted=5)  # since then, so the folder is asked about
    recipe = short_recipe(*ONE, f"data.path={stopped / 'images'}")
    with pytest.raises(DataError, match="the classes"):
        train_recipe(recipe, stopped / "run", resume=True)

    folders = [f"data.path={stopped / 'images'}", "data.classes_from=folders"]
    with pytest.raises(DataError, match="classes a, b"):
        train_recipe(short_recipe(*ONE, *folders), stopped / "run", resume=True)
    recipe = short_recipe(*ONE, *folders, "data.leave_out=unsorted")
    assert train_recipe(recipe, stopped / "run", resume=True).num_epochs == 1


def test_the_data_may_move_but_not_change(stopped) -> None:
    moved = stopped / "moved"
    (stopped / "images").rename(moved)
    recipe = short_recipe(*ONE, f"data.path={moved}")
    (moved / "b").rename(moved / "c")

    with pytest.raises(DataError, match="classes a, b"):
        train_recipe(recipe, stopped / "run", resume=True)

    (moved / "c").rename(moved / "b")
    for number in range(3):
        shutil.copy(moved / "a" / "000.jpg", moved / "a" / f"more{number}.jpg")

    with pytest.raises(DataError, match=r"8 training images.*11"):
        train_recipe(recipe, stopped / "run", resume=True)

    for number in range(3):
        (moved / "a" / f"more{number}.jpg").unlink()
    path = stopped / "run" / "last.pt"
    training = open_division(recipe, read_checkpoint(path), path).data.train
    replaced = training.path(0)
    content = replaced.read_bytes()
    replaced.write_bytes(content + b"another photograph")

    with pytest.raises(DataError, match="their order"):
        train_recipe(recipe, stopped / "run", resume=True)

    replaced.write_bytes(content)
    assert train_recipe(recipe, stopped / "run", resume=True).num_epochs == 1


RESUME = """
import sys
from pathlib import Path
from tests.sopdeploy.training.runs import short_recipe
from sopdeploy.training.train import train_recipe
train_recipe(short_recipe(*sys.argv[2:]), Path(sys.argv[1]), resume=True)
"""


@pytest.mark.slow
def test_a_run_resumed_on_another_processor_keeps_its_held_out_images(stopped) -> None:
    whole = train_recipe(
        short_recipe(*ONE, f"data.path={stopped / 'images'}"), stopped / "whole"
    )
    moved = stopped / "moved"
    (stopped / "images").rename(moved)
    elsewhere = {
        **os.environ,
        "OPENBLAS_CORETYPE": "Prescott",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    settings = [*ONE, f"data.path={moved}"]
    subprocess.run(
        [sys.executable, "-c", RESUME, stopped / "run", *settings], env=elsewhere, check=True
    )
    runs = [read_checkpoint(stopped / name / "last.pt") for name in ("whole", "run")]

    assert whole.held_out_count == len(runs[0].resume["held_out"]) == 2
    assert runs[0].resume["held_out"].equal(runs[1].resume["held_out"])
    assert same_run(stopped / "run", stopped / "whole")


def test_the_record_decides_what_is_held_out(stopped, monkeypatch) -> None:
    def choose(images, *_):
        raise AssertionError("the run has recorded its choice")

    monkeypatch.setattr(division, "choose_held_out", choose)
    record = read_checkpoint(stopped / "run" / "last.pt").resume["held_out"][:, 0].tolist()
    (stopped / "images" / "a" / "000.jpg").rename(stopped / "images" / "a" / "renamed.jpg")
    recipe = short_recipe(*ONE, f"data.path={stopped / 'images'}")
    train_recipe(recipe, stopped / "run", resume=True)
    path = stopped / "run" / "last.pt"
    last = read_checkpoint(path)
    assert last.resume["held_out"][:, 0].tolist() == record
    held_out = open_division(recipe, last, path).data.held_out
    assert len(record) == len(held_out) == 2
    assert set(hash_images(held_out).tolist()) == set(record)


def test_a_loss_with_nan_ends_the_run_and_names_the_part(tmp_path, monkeypatch) -> None:
    calls, part = [], "layer2_0"

    def damaged_loss(*arguments) -> Loss:
        loss = original(*arguments)
        calls.append(loss)
        return loss if len(calls) < 9 else Loss(loss.total * NAN, {**loss.parts, part: NAN})

    original = gradient.training_loss
    monkeypatch.setattr(gradient, "training_loss", damaged_loss)
    with pytest.raises(TrainingError, match=f"step 3: {part}"):
        train_recipe(short_recipe(), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    assert last.training["epoch"] == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last.weights.values())


def test_a_non_finite_buffer_ends_the_run(tmp_path, monkeypatch) -> None:
    calls = []

    def compute_gradient(run, *rest):
        loss = original(run, *rest)
        calls.append(run.position)
        if len(calls) == 8:
            run.model.get_buffer("bn1.running_var").fill_(float("inf"))
        return loss

    original = gradient.compute_gradient
    monkeypatch.setattr(gradient, "compute_gradient", compute_gradient)
    message = r"step 2: .*gradient"
    with pytest.raises(TrainingError, match=message):
        train_recipe(short_recipe("save.every_minutes=1e-9"), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (last.training["epoch"], last.training["step"]) == (1, 1)


def test_no_checkpoint_with_a_non_finite_number_is_written(tmp_path, monkeypatch) -> None:
    runs = list[LoopState]()

    class Damage(RecordingCallback):
        def on_evaluation_batch(self, **progress) -> None:
            optimizer = runs[0].updates.optimizer
            next(iter(optimizer.state.values()))["momentum_buffer"].view(-1)[0] = float("nan")

    monkeypatch.setattr(
        "sopdeploy.training.loop.state.LoopState",
        lambda start: runs.append(LoopState(start)) or runs[0],
    )
    with pytest.raises(TrainingError, match="finite"):
        train_recipe(short_recipe("ema={}"), tmp_path / "run", callback=Damage())
    assert not (tmp_path / "run").exists()
