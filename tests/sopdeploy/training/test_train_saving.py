"""When checkpoints are written, what is left where one cannot be, and what is never written."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from sopdeploy import checkpoint as module
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError, TrainingError
from sopdeploy.training import run_folder
from sopdeploy.training.loop import train
from sopdeploy.training.precision import not_finite
from sopdeploy.training.signals import TrainingStoppedError
from tests.sopdeploy.training.runs import Onlooker, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(short_recipe(), out)
    return out


class Watching(Onlooker):
    """Writes down where the checkpoint in the folder is after each step."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.last, self.seen = folder / "last.pt", []

    def stepped(self, **facts) -> None:
        if self.last.exists():
            training = read_checkpoint(self.last).training
            self.seen.append((training["epoch"], training["step"]))
        super().stepped(**facts)


def test_checkpoints_are_written_every_few_steps_and_change_nothing(tmp_path, undisturbed) -> None:
    onlooker = Watching(tmp_path / "run")
    train(short_recipe("save.every_steps=2"), tmp_path / "run", progress=onlooker)
    assert list(dict.fromkeys(onlooker.seen)) == [
        (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)
    ]  # fmt: skip
    weights = (read_checkpoint(out / "last.pt").weights for out in (tmp_path / "run", undisturbed))
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("pace", "saved"), [(60, {(0, 3)}), (120, {(0, 2), (0, 4)})])
def test_checkpoints_are_written_every_few_minutes(tmp_path, monkeypatch, pace, saved) -> None:
    clock = iter(range(0, 10_000, pace))  # so many seconds pass between two looks at it
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    onlooker = Watching(tmp_path / "run")
    train(short_recipe("epochs=1", "save.every_minutes=3"), tmp_path / "run", progress=onlooker)
    assert set(onlooker.seen) == saved


def test_kept_checkpoints_can_be_gone_on_from_and_stay_as_they_are(tmp_path) -> None:
    train(short_recipe("save.keep_every=2"), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").glob("epoch-*.pt"))
    assert names == ["epoch-0002.pt"]
    kept = read_checkpoint(tmp_path / "run" / "epoch-0002.pt")
    assert kept.training["epoch"] == 2
    assert kept.resume is not None
    assert read_checkpoint(tmp_path / "run" / "previous.pt").training["epoch"] == 2


def test_a_truncated_last_checkpoint_falls_back_to_the_previous_one_on_one_line(
    tmp_path, undisturbed
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingStoppedError):
        train(short_recipe(), out, progress=Onlooker(("stepped", 2, 1)))
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    onlooker = Onlooker()
    train(short_recipe(), out, resume=True, progress=onlooker)
    warnings = [facts["warning"] for what, facts in onlooker.told if what == "warned"]
    assert len(warnings) == 1
    assert warnings[0].endswith(f"going on from {out / 'previous.pt'}")
    assert "\n" not in warnings[0]
    assert same_run(out, undisturbed)


def test_a_damaged_last_checkpoint_never_takes_the_place_of_the_previous_one(tmp_path) -> None:
    out = tmp_path / "run"
    train(short_recipe("epochs=2"), out)
    (out / "last.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingStoppedError):
        train(short_recipe("epochs=2"), out, resume=True, progress=Onlooker(("stepped", 1, 0)))
    assert read_checkpoint(out / "previous.pt").training["epoch"] == 1
    assert read_checkpoint(out / "last.pt").training["step"] == 1


def test_two_damaged_checkpoints_are_an_error(tmp_path) -> None:
    out = tmp_path / "run"
    train(short_recipe("epochs=2"), out)
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"previous\.pt: "):
        train(short_recipe("epochs=2"), out, resume=True)


def test_auto_begins_a_run_and_then_goes_on_with_it(tmp_path, undisturbed) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingStoppedError):
        train(short_recipe(), out, resume="auto", progress=Onlooker(("stepped", 1, 1)))
    train(short_recipe(), out, resume="auto")
    assert same_run(out, undisturbed)


def test_auto_overwrites_nothing_that_is_no_run(tmp_path) -> None:
    (tmp_path / "best.pt").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists and is no empty folder"):
        train(short_recipe(), tmp_path, resume="auto")
    assert (tmp_path / "best.pt").read_bytes() == b"mine"


def test_what_a_kill_left_half_written_is_no_run(tmp_path) -> None:
    (tmp_path / "last.pt.partial").write_bytes(b"half")
    assert train(short_recipe("epochs=1"), tmp_path, resume="auto").epochs == 1
    assert not (tmp_path / "last.pt.partial").exists()


def test_sigusr1_saves_and_the_run_goes_on(tmp_path, undisturbed) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    watching = Watching(tmp_path / "run")
    watching.stop_at, watching.signal_number = ("stepped", 0, 2), signal.SIGUSR1
    train(short_recipe(), tmp_path / "run", progress=watching)
    assert watching.seen[0] == (0, 3)
    assert same_run(tmp_path / "run", undisturbed)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_disk_that_is_full_later_leaves_the_checkpoints_before(tmp_path, monkeypatch, undisturbed) -> None:
    out, save, seen = tmp_path / "run", torch.save, []

    def full(content, file) -> None:
        seen.append(content["training"]["epoch"])
        if content["training"]["epoch"] == 2:
            file.write(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"last\.pt: cannot be written .*No space left on device"):
        train(short_recipe(), out)
    monkeypatch.undo()
    assert not list(out.glob("*.partial"))
    assert read_checkpoint(out / "last.pt").training["epoch"] == 1
    train(short_recipe(), out, resume=True)
    assert same_run(out, undisturbed)


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    train(short_recipe("epochs=2", "save.keep_every=1"), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "previous.pt").training["epoch"] == 1
    assert read_checkpoint(tmp_path / "run" / "epoch-0002.pt").training["epoch"] == 2


def test_a_history_longer_than_the_checkpoint_is_cut_back(tmp_path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingStoppedError):
        train(short_recipe(), out, progress=Onlooker(("stepped", 1, 1)))
    table = (out / "history.csv").read_text()
    (out / "history.csv").write_text(table + table.splitlines()[1].replace("1,", "2,", 1) + "\n")
    with pytest.raises(TrainingStoppedError):
        train(short_recipe(), out, resume=True, progress=Onlooker(("stepped", 1, 3)))
    assert (out / "history.csv").read_text() == table


def spoil_buffer(model) -> None:
    next(b for name, b in model.named_buffers() if name.endswith("running_var")).fill_(float("inf"))


def test_a_buffer_that_is_not_finite_is_named_with_the_samples(tmp_path, monkeypatch) -> None:
    from sopdeploy.training import loop

    original, calls = loop.loss_and_gradient, []

    def spoilt(run, *rest):
        loss = original(run, *rest)
        calls.append(1)
        if len(calls) == 8:
            spoil_buffer(run.model)
        return loss

    monkeypatch.setattr(loop, "loss_and_gradient", spoilt)
    with pytest.raises(
        TrainingError, match=r"epoch 2, step 2: the buffer \S+running_var is not finite; .* \(samples \d+, "
    ):
        train(short_recipe("save.every_steps=1"), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (last.training["epoch"], last.training["step"]) == (1, 1)


def test_a_gradient_that_is_not_finite_is_named_with_its_parameter(tmp_path, monkeypatch) -> None:
    from sopdeploy.training import loop

    original = loop.loss_and_gradient

    def spoilt(run, *rest):
        loss = original(run, *rest)
        run.model.get_parameter("fc.weight").grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(loop, "loss_and_gradient", spoilt)
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: the gradient of fc\.weight is not"):
        train(short_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["weights", "optimizer", "average"])
def test_no_checkpoint_with_a_number_that_is_not_finite_is_written(tmp_path, monkeypatch, where) -> None:
    class Spoiling(Onlooker):
        def measured(self, **facts) -> None:
            run = runs[0]
            if where == "weights":
                run.model.get_parameter("fc.weight").data[0, 0] = float("nan")
            elif where == "optimizer":
                next(iter(run.optimizer.state.values()))["momentum_buffer"].fill_(float("inf"))
            else:
                run.average.model.get_parameter("conv1.weight").data.fill_(float("nan"))

    from sopdeploy.training import loop

    original, runs = loop.start_run, []
    monkeypatch.setattr(loop, "start_run", lambda *given: runs.append(original(*given)) or runs[0])
    with pytest.raises(TrainingError, match="finite"):
        train(short_recipe("ema={}"), tmp_path / "run", progress=Spoiling())
    assert not (tmp_path / "run").exists()


def test_many_samples_are_counted_not_listed() -> None:
    message = str(not_finite("main", 0, 4, list(range(100))))
    assert message.startswith("epoch 1, step 5: main is not finite; lower optimizer.lr or set")
    assert message.endswith("13, 14, 15 and 84 more)")
