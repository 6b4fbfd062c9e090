"""When checkpoints are written, what remains if one cannot be, and what is never written."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from sopdeploy import checkpoint as module
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError, TrainingError
from sopdeploy.training import loop, run_folder
from sopdeploy.training.loop import train
from sopdeploy.training.precision import non_finite_error
from tests.sopdeploy.training.runs import RecordingCallback, interrupt, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(short_recipe(), tmp_path_factory.mktemp("runs") / "uninterrupted").out


class CheckpointWatcher(RecordingCallback):
    """Records the position in `last.pt` after each step."""

    def __init__(self, folder, *stop_at) -> None:
        super().__init__(stop_at, signal.SIGUSR1)
        self.last, self.positions = folder / "last.pt", []

    def on_step_end(self, **progress) -> None:
        if self.last.exists():
            training = read_checkpoint(self.last).training
            self.positions.append((training["epoch"], training["step"]))
        super().on_step_end(**progress)


def test_checkpoints_every_few_steps_do_not_change_the_result(tmp_path, uninterrupted) -> None:
    watcher = CheckpointWatcher(tmp_path / "run")
    train(short_recipe("save.every_steps=2"), tmp_path / "run", callback=watcher)
    expected = [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)]
    assert list(dict.fromkeys(watcher.positions)) == expected
    first, second = (read_checkpoint(out / "last.pt").weights for out in (tmp_path / "run", uninterrupted))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("interval", "saved"), [(60, {(0, 3)}), (120, {(0, 2), (0, 4)})])
def test_checkpoints_are_written_every_few_minutes(tmp_path, monkeypatch, interval, saved) -> None:
    clock = iter(range(0, 10_000, interval))  # seconds pass between two reads of the clock
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    watcher = CheckpointWatcher(tmp_path / "run")
    train(short_recipe("epochs=1", "save.every_minutes=3"), tmp_path / "run", callback=watcher)
    assert set(watcher.positions) == saved


def test_kept_checkpoints_can_be_resumed_and_are_not_overwritten(tmp_path) -> None:
    train(short_recipe("save.keep_every=2"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("epoch-*.pt")] == ["epoch-0002.pt"]
    kept = read_checkpoint(tmp_path / "run" / "epoch-0002.pt")
    assert kept.training["epoch"] == 2
    assert kept.resume is not None
    assert read_checkpoint(tmp_path / "run" / "previous.pt").training["epoch"] == 2


def test_a_truncated_last_checkpoint_falls_back_to_the_previous_one(tmp_path, uninterrupted) -> None:
    out, callback = tmp_path / "run", RecordingCallback()
    interrupt(short_recipe(), out, "step", 2, 1)
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    train(short_recipe(), out, resume=True, callback=callback)
    (warning,) = [values["warning"] for name, values in callback.events if name == "warning"]
    assert warning.endswith(f"resuming from {out / 'previous.pt'}")
    assert "\n" not in warning
    assert same_run(out, uninterrupted)


def test_a_damaged_last_checkpoint_never_replaces_the_previous_one(tmp_path) -> None:
    out = tmp_path / "run"
    train(short_recipe("epochs=2"), out)
    (out / "last.pt").write_bytes(b"damaged")
    interrupt(short_recipe("epochs=2"), out, "step", 1, 0, resume=True)
    assert read_checkpoint(out / "previous.pt").training["epoch"] == 1
    assert read_checkpoint(out / "last.pt").training["step"] == 1
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"previous\.pt: "):
        train(short_recipe("epochs=2"), out, resume=True)


def test_auto_starts_a_run_or_resumes_it(tmp_path, uninterrupted) -> None:
    interrupt(short_recipe(), tmp_path / "run", "step", 1, 1, resume="auto")
    train(short_recipe(), tmp_path / "run", resume="auto")
    assert same_run(tmp_path / "run", uninterrupted)


def test_auto_overwrites_partial_files_only(tmp_path) -> None:
    (tmp_path / "last.pt.partial").write_bytes(b"half")
    (tmp_path / "best.pt").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        train(short_recipe(), tmp_path, resume="auto")
    assert (tmp_path / "best.pt").read_bytes() == b"mine"
    (tmp_path / "best.pt").unlink()
    assert train(short_recipe("epochs=1"), tmp_path, resume="auto").epochs == 1
    assert not (tmp_path / "last.pt.partial").exists()


def test_sigusr1_saves_and_the_run_continues(tmp_path, uninterrupted) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    watcher = CheckpointWatcher(tmp_path / "run", "step", 0, 2)
    train(short_recipe(), tmp_path / "run", callback=watcher)
    assert watcher.positions[0] == (0, 3)
    assert same_run(tmp_path / "run", uninterrupted)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_full_disk_leaves_the_previous_checkpoints(tmp_path, monkeypatch, uninterrupted) -> None:
    out, save = tmp_path / "run", torch.save

    def fail_in_epoch_2(content, file) -> None:
        if content["training"]["epoch"] == 2:
            file.write(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(module.torch, "save", fail_in_epoch_2)
    with pytest.raises(CheckpointError, match=r"last\.pt: .*No space left on device"):
        train(short_recipe(), out)
    monkeypatch.undo()
    assert not list(out.glob("*.partial"))
    assert read_checkpoint(out / "last.pt").training["epoch"] == 1
    train(short_recipe(), out, resume=True)
    assert same_run(out, uninterrupted)


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    train(short_recipe("epochs=2", "save.keep_every=1"), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "previous.pt").training["epoch"] == 1
    assert read_checkpoint(tmp_path / "run" / "epoch-0002.pt").training["epoch"] == 2


def test_a_history_longer_than_the_checkpoint_is_shortened(tmp_path) -> None:
    history = tmp_path / "run" / "history.csv"
    interrupt(short_recipe(), tmp_path / "run", "step", 1, 1)
    table = history.read_text()
    history.write_text(table + table.splitlines()[1].replace("1,", "2,", 1) + "\n")
    interrupt(short_recipe(), tmp_path / "run", "step", 1, 3, resume=True)
    assert history.read_text() == table


def damage_after_gradient(monkeypatch, number: int, damage) -> None:
    """Call *damage* with the run after the gradient of step *number*, counted from 1."""
    original, calls = loop.compute_gradient, []

    def compute_gradient(run, *rest):
        loss = original(run, *rest)
        calls.append(1)
        if len(calls) == number:
            damage(run)
        return loss

    monkeypatch.setattr(loop, "compute_gradient", compute_gradient)


def test_a_non_finite_buffer_is_named_with_the_samples(tmp_path, monkeypatch) -> None:
    def damage(run) -> None:
        run.model.get_buffer("bn1.running_var").fill_(float("inf"))

    damage_after_gradient(monkeypatch, 8, damage)
    message = r"epoch 2, step 2: the buffer \S+running_var is not finite; .* \(samples \d+, "
    with pytest.raises(TrainingError, match=message):
        train(short_recipe("save.every_steps=1"), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (last.training["epoch"], last.training["step"]) == (1, 1)


def test_a_non_finite_gradient_is_named_with_its_parameter(tmp_path, monkeypatch) -> None:
    def damage(run) -> None:
        run.model.get_parameter("fc.weight").grad[0, 0] = float("nan")

    damage_after_gradient(monkeypatch, 1, damage)
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: the gradient of fc\.weight is not"):
        train(short_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["weights", "optimizer", "average"])
def test_no_checkpoint_with_a_non_finite_number_is_written(tmp_path, monkeypatch, where) -> None:
    runs = []

    class Damage(RecordingCallback):
        def on_evaluation_batch(self, **progress) -> None:
            (run,) = runs
            if where == "weights":
                run.model.get_parameter("fc.weight").data[0, 0] = float("nan")
            elif where == "optimizer":
                next(iter(run.optimizer.state.values()))["momentum_buffer"].fill_(float("inf"))
            else:
                run.ema.model.get_parameter("conv1.weight").data.fill_(float("nan"))

    original = loop.create_run
    monkeypatch.setattr(loop, "create_run", lambda *given: runs.append(original(*given)) or runs[0])
    with pytest.raises(TrainingError, match="finite"):
        train(short_recipe("ema={}"), tmp_path / "run", callback=Damage())
    assert not (tmp_path / "run").exists()


def test_an_error_lists_a_limited_number_of_samples() -> None:
    message = str(non_finite_error("main", 0, 4, list(range(100))))
    assert message.startswith("epoch 1, step 5: main is not finite; lower optimizer.lr or set")
    assert message.endswith("13, 14, 15 and 84 more)")
