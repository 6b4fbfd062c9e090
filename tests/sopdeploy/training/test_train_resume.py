import signal
import threading

import pytest

from sopdeploy.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy.training.loop import train
from sopdeploy.training.signals import TrainingStoppedError
from tests.sopdeploy.training.runs import Onlooker, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(short_recipe(), out)
    return out


MOMENTS = [
    ("stepped", 0, 0),
    ("stepped", 1, 2),
    ("stepped", 1, 5),
    ("measured", 1, 60),
    ("measured", 2, 91),
    ("finished", 0, 0),
    ("finished", 1, 0),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=["-".join(map(str, moment)) for moment in MOMENTS])
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(tmp_path, undisturbed, moment) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingStoppedError, match="go on with --resume"):
        train(short_recipe(), out, progress=Onlooker(moment))
    assert not same_run(out, undisturbed)
    result = train(short_recipe(), out, resume=True)
    assert same_run(out, undisturbed)
    assert result.epochs == 3
    assert (out / "history.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 2)])
def test_the_number_of_loader_processes_changes_nothing_also_over_a_stop(
    tmp_path, undisturbed, before, after
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingStoppedError):
        train(short_recipe(f"workers={before}"), out, progress=Onlooker(("stepped", 1, 2)))
    train(short_recipe(f"workers={after}"), out, resume=True)
    assert same_run(out, undisturbed)


def test_a_run_stopped_many_times_ends_with_the_same_bits(tmp_path, undisturbed) -> None:
    out, stops = tmp_path / "run", 0
    for epoch in range(3):
        for step in (1, 4):
            with pytest.raises(TrainingStoppedError):
                train(short_recipe(), out, resume=stops > 0, progress=Onlooker(("stepped", epoch, step)))
            stops += 1
    train(short_recipe(), out, resume=True)
    assert same_run(out, undisturbed)


def test_a_run_killed_between_best_and_last_ends_with_the_same_bits(
    tmp_path, undisturbed, monkeypatch
) -> None:
    from sopdeploy.training.distributed import strategy as parallel

    class Killed(BaseException):
        pass

    def write(path, checkpoint):
        if path.name == "last.pt" and checkpoint.training["epoch"] == 2:
            raise Killed
        original(path, checkpoint)

    out, original = tmp_path / "run", parallel.write_checkpoint
    monkeypatch.setattr(parallel, "write_checkpoint", write)
    with pytest.raises(Killed):
        train(short_recipe(), out)
    monkeypatch.undo()
    train(short_recipe(), out, resume=True)
    assert same_run(out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_gives_the_handlers_back(tmp_path, number) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TrainingStoppedError) as stopped:
        train(short_recipe(), tmp_path / "run", progress=Onlooker(("stepped", 1, 2), number))
    assert str(stopped.value) == (
        "stopped in epoch 2 of 3 after 3 steps of it; "
        f"{tmp_path / 'run' / 'last.pt'} is saved, go on with --resume"
    )
    assert stopped.value.signal_number == number
    assert signal.getsignal(number) == before
    checkpoint = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (checkpoint.training["epoch"], checkpoint.training["step"]) == (1, 3)
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == [
        "best.pt",
        "history.csv",
        "last.pt",
        "previous.pt",
    ]


@pytest.fixture
def heeds_ctrl_c():
    """Let SIGINT raise, which a shell that starts the tests in the background has it ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path) -> None:
    class Impatient(Onlooker):
        def maybe_stop(self, *moment) -> None:
            if moment == ("stepped", 0, 0):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(short_recipe(), tmp_path / "run", progress=Impatient())
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_epoch_does_not_spoil_a_finished_run(tmp_path) -> None:
    assert (
        train(short_recipe("epochs=1"), tmp_path / "run", progress=Onlooker(("finished", 0, 0))).epochs == 1
    )


def test_a_finished_run_resumed_does_nothing_and_gives_the_same_result(tmp_path) -> None:
    recipe = short_recipe("epochs=1")
    first = train(recipe, tmp_path / "run")
    onlooker = Onlooker()
    assert train(recipe, tmp_path / "run", resume=True, progress=onlooker) == first
    assert [what for what, _ in onlooker.told] == ["started"]


def test_training_outside_the_main_thread_works_without_signals(tmp_path) -> None:
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(short_recipe("epochs=1"), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert results[0].epochs == 1


def test_a_checkpoint_of_the_first_engine_is_gone_on_from(tmp_path, undisturbed) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingStoppedError):
        train(short_recipe(), out, progress=Onlooker(("stepped", 1, 2)))
    checkpoint = read_checkpoint(out / "last.pt")
    assert checkpoint.resume is not None
    for key in ("precision", "weights", "average"):
        del checkpoint.resume[key]
    recipe = checkpoint.training["recipe"]
    for key in (
        "accumulate",
        "precision",
        "channels_last",
        "compile",
        "sampler",
        "distort",
        "mix",
        "ema",
        "save",
    ):
        del recipe[key]
    del recipe["optimizer"]["kind"], recipe["model"]["remove_branches_at"]
    write_checkpoint(out / "last.pt", checkpoint)
    train(short_recipe(), out, resume=True)
    assert same_run(out, undisturbed)
