import os

import pytest
import torch

from sopdeploy.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError, DataError, TrainingError
from sopdeploy.training.loop import train
from sopdeploy.training.losses import Loss
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.signals import TrainingStoppedError
from tests.sopdeploy.data.test_data_folder import make
from tests.sopdeploy.training.runs import Onlooker, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

ONE = ("epochs=1", "data={kind='folder'}", "batch_size=4")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no empty folder; choose another --out"):
        train(short_recipe(), tmp_path)
    with pytest.raises(ConfigError, match="exists and is no empty folder"):
        train(short_recipe(), tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match=r"cannot be created in .*; choose another --out"):
        train(short_recipe(), tmp_path / "notes.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_may_be_used(tmp_path) -> None:
    assert train(short_recipe("epochs=1"), tmp_path).out == tmp_path


def test_another_run_is_never_overwritten(tmp_path) -> None:
    train(short_recipe("epochs=1"), tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match="holds a run; go on with --resume or choose another --out"):
        train(short_recipe("epochs=1"), tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_nothing_to_resume_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume; leave --resume out"):
        train(short_recipe(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stopped(tmp_path):
    """Return the folder of a run on a folder of images that was stopped in its first epoch."""
    make(tmp_path / "images", a=5, b=5)
    recipe = short_recipe(*ONE, f"data.path={tmp_path / 'images'}")
    with pytest.raises(TrainingStoppedError):
        train(recipe, tmp_path / "run", progress=Onlooker(("stepped", 0, 0)))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "the run began with seed = 0, now it is 1"),
        ("optimizer.lr=0.5", "the run began with optimizer.lr = 0.1, now it is 0.5"),
        ("epochs=9", "the run began with epochs = 1, now it is 9"),
        ("model.config.base_width=8", "the run began with model.config.base_width = 4, now it is 8"),
        ("schedule={kind='milestones'}", "the run began with schedule.gamma = None, now it is 0.1"),
    ],
)
def test_a_run_is_resumed_with_its_own_recipe_only(stopped, override, message) -> None:
    with pytest.raises(ConfigError) as problem:
        train(short_recipe(*ONE, f"data.path={stopped / 'images'}", override), stopped / "run", resume=True)
    assert message in str(problem.value)


def test_the_data_may_have_moved_but_not_changed(stopped) -> None:
    moved = stopped / "moved"
    (stopped / "images").rename(moved)
    recipe = short_recipe(*ONE, f"data.path={moved}")
    (moved / "b").rename(moved / "c")
    with pytest.raises(DataError, match="the run has the classes a, b; give the same data"):
        train(recipe, stopped / "run", resume=True)
    (moved / "c").rename(moved / "b")
    make(moved / "a", more=3)
    with pytest.raises(DataError, match="began with 8 training pictures, there are 10 now"):
        train(recipe, stopped / "run", resume=True)
    for number in range(3):
        (moved / "a" / "more" / f"{number:03}.jpg").unlink()
    assert train(recipe, stopped / "run", resume=True).epochs == 1


def damage_position(resume: dict) -> None:
    resume["position"] = {"epoch": "many"}


def damage_optimizer(resume: dict) -> None:
    resume["optimizer"] = {"state": {}, "param_groups": []}


def forget_optimizer(resume: dict) -> None:
    del resume["optimizer"]


@pytest.mark.parametrize("damage", [damage_position, damage_optimizer, forget_optimizer])
def test_a_damaged_state_is_refused(stopped, damage) -> None:
    last = stopped / "run" / "last.pt"
    checkpoint = read_checkpoint(last)
    damage(checkpoint.resume)
    write_checkpoint(last, checkpoint)
    with pytest.raises(CheckpointError, match=r"last\.pt: .*begin a new run"):
        train(short_recipe(*ONE, f"data.path={stopped / 'images'}"), stopped / "run", resume=True)


def test_a_checkpoint_without_a_state_is_refused(tmp_path) -> None:
    out = tmp_path / "run"
    train(short_recipe("epochs=1"), out)
    (out / "best.pt").replace(out / "last.pt")
    with pytest.raises(CheckpointError, match="holds no state to go on from"):
        train(short_recipe("epochs=1"), out, resume=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_run_on_one_line_and_leaves_nothing(tmp_path, workers) -> None:
    make(tmp_path / "images", a=5, b=5)
    for path in (tmp_path / "images" / "a").iterdir():
        path.write_bytes(b"no image")
    recipe = short_recipe(*ONE, f"data.path={tmp_path / 'images'}", f"workers={workers}")
    with pytest.raises(DataError, match=r"a/00\d\.jpg: not an image; delete or replace it$"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["main", "layer2_0"])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_part(tmp_path, monkeypatch, part) -> None:
    from sopdeploy.training import loop as module

    calls = []

    def spoilt(output, labels, weights, label_smoothing) -> Loss:
        loss = original(output, labels, weights, label_smoothing)
        calls.append(loss)
        if len(calls) < 9:
            return loss
        nan = torch.tensor(float("nan"))
        return Loss(loss.total * nan, {**loss.parts, part: nan})

    original = module.training_loss
    monkeypatch.setattr(module, "training_loss", spoilt)
    with pytest.raises(TrainingError, match=f"epoch 2, step 3: {part} is not finite; lower optimizer.lr"):
        train(short_recipe(), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    assert last.training["epoch"] == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last.weights.values())


def test_a_run_that_diverges_ends_with_a_training_error_and_no_broken_checkpoint(tmp_path) -> None:
    with pytest.raises(TrainingError, match="finite"):
        train(short_recipe("optimizer.lr=1e30", "optimizer.clip_norm=0.0"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch) -> None:
    from sopdeploy.training import loop as module

    monkeypatch.setattr(module, "get_total_norm", lambda _gradients: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match="epoch 1, step 1: gradient is not finite"):
        train(short_recipe(), tmp_path / "run")


def test_a_cuda_device_that_is_not_there_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device on this machine"):
        train(short_recipe("device=cuda"), tmp_path / "run")


def test_a_folder_recipe_without_data_says_which_key_to_set(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: not set"):
        train(read_recipe("photos-dsop"), tmp_path / "run")


def test_a_full_disk_is_a_checkpoint_error_and_leaves_no_partial_file(tmp_path, monkeypatch) -> None:
    def full(_descriptor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(short_recipe("epochs=1"), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
