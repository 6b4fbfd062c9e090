"""Stopped and resumed runs end with the same bits as uninterrupted ones."""

import signal
import threading

import pytest

from sopdeploy.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy.training.distributed import strategy
from sopdeploy.training.loop import train
from tests.sopdeploy.training.runs import RecordingCallback, interrupt, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    return train(short_recipe(), tmp_path_factory.mktemp("runs") / "uninterrupted").out


EVENTS = [
    ("step", 0, 0),
    ("step", 1, 2),
    ("step", 1, 5),
    ("evaluation", 1, 60),
    ("evaluation", 2, 91),
    ("epoch", 0, 0),
    ("epoch", 1, 0),
]


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_a_run_stopped_at_any_time_resumes_to_the_same_bits(tmp_path, uninterrupted, event) -> None:
    out = tmp_path / "run"
    interrupt(short_recipe(), out, *event)
    assert not same_run(out, uninterrupted)
    assert train(short_recipe(), out, resume=True).epochs == 3
    assert same_run(out, uninterrupted)
    assert (out / "history.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 2)])
def test_the_number_of_workers_does_not_change_the_result(tmp_path, uninterrupted, before, after) -> None:
    interrupt(short_recipe(f"workers={before}"), tmp_path / "run", "step", 1, 2)
    train(short_recipe(f"workers={after}"), tmp_path / "run", resume=True)
    assert same_run(tmp_path / "run", uninterrupted)


def test_a_run_stopped_many_times_ends_with_the_same_bits(tmp_path, uninterrupted) -> None:
    out = tmp_path / "run"
    for epoch in range(3):
        for step in (1, 4):
            interrupt(short_recipe(), out, "step", epoch, step, resume=out.exists())
    train(short_recipe(), out, resume=True)
    assert same_run(out, uninterrupted)


def test_a_run_killed_before_last_is_written_ends_with_the_same_bits(
    tmp_path, uninterrupted, monkeypatch
) -> None:
    class Killed(BaseException):
        pass

    def write(path, checkpoint):
        if path.name == "last.pt" and checkpoint.training["epoch"] == 2:
            raise Killed
        original(path, checkpoint)

    out, original = tmp_path / "run", strategy.write_checkpoint
    monkeypatch.setattr(strategy, "write_checkpoint", write)
    with pytest.raises(Killed):
        train(short_recipe(), out)
    monkeypatch.undo()
    train(short_recipe(), out, resume=True)
    assert same_run(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_restores_the_handlers(tmp_path, number) -> None:
    before = signal.getsignal(number)
    last = tmp_path / "run" / "last.pt"
    stopped = interrupt(short_recipe(), tmp_path / "run", "step", 1, 2, signal_number=number)
    assert str(stopped) == (
        f"stopped in epoch 2 of 3 after 3 steps of it; {last} is saved, continue with --resume"
    )
    assert stopped.signal_number == number
    assert signal.getsignal(number) == before
    checkpoint = read_checkpoint(last)
    assert (checkpoint.training["epoch"], checkpoint.training["step"]) == (1, 3)
    names = {path.name for path in last.parent.iterdir()}
    assert names == {"best.pt", "history.csv", "last.pt", "previous.pt"}


@pytest.fixture
def sigint_raises():
    """Make SIGINT raise KeyboardInterrupt; shells make background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_raises")
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path) -> None:
    class Impatient(RecordingCallback):
        def on_step_end(self, **_) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(short_recipe(), tmp_path / "run", callback=Impatient())
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_epoch_has_no_effect(tmp_path) -> None:
    callback = RecordingCallback(("epoch", 0, 0))
    assert train(short_recipe("epochs=1"), tmp_path / "run", callback=callback).epochs == 1


def test_resuming_a_finished_run_returns_the_same_result(tmp_path) -> None:
    recipe, callback = short_recipe("epochs=1"), RecordingCallback()
    first = train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run", resume=True, callback=callback) == first
    assert [name for name, _ in callback.events] == ["train_start"]


def test_training_works_outside_the_main_thread(tmp_path) -> None:
    results = []
    recipe = short_recipe("epochs=1")
    thread = threading.Thread(target=lambda: results.append(train(recipe, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].epochs == 1


def test_a_checkpoint_of_the_first_version_can_be_resumed(tmp_path, uninterrupted) -> None:
    out = tmp_path / "run"
    interrupt(short_recipe(), out, "step", 1, 2)
    checkpoint = read_checkpoint(out / "last.pt")
    assert checkpoint.resume is not None
    for key in ("precision", "weights", "average"):
        del checkpoint.resume[key]
    recipe = checkpoint.training["recipe"]
    added = "accumulate precision channels_last compile sampler distort mix ema save"
    for key in added.split():
        del recipe[key]
    del recipe["optimizer"]["kind"], recipe["model"]["remove_branches_at"]
    write_checkpoint(out / "last.pt", checkpoint)
    train(short_recipe(), out, resume=True)
    assert same_run(out, uninterrupted)
