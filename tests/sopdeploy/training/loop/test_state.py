"""When checkpoints are written; stopped, killed and resumed runs end with the bits of uninterrupted ones."""

import csv
import errno
import multiprocessing
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.training.callback import Callback
from sopdeploy.training.loop import state
from sopdeploy.training.loop.losses import Loss
from sopdeploy.training.records import run_folder
from sopdeploy.training.records.checkpoints import Position
from sopdeploy.training.train import train_recipe
from sopdeploy.weights import checkpoint as module
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.training.runs import (
    RecordingCallback,
    deliver,
    few_digits,
    forkserver,
    interrupt,
    one_process_run,
    same_bits,
    same_run,
    short_recipe,
)

pytestmark = pytest.mark.usefixtures("few_digits")
FILES = {"best.pt", "history.csv", "last.pt", "run.json", "recipe.toml"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    return train_recipe(short_recipe(), tmp_path_factory.mktemp("runs") / "uninterrupted").out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "workers"),
    [
        (("step", 0, 0), (0, 0)),
        (("step", 1, 2), (2, 2)),
        (("evaluation", 1, 36), (0, 0)),
        (("epoch", 1, 0), (0, 0)),
    ],
    ids=str,
)
def test_a_run_stopped_at_any_time_resumes_to_the_same_bits(
    tmp_path, uninterrupted, event, workers
) -> None:
    out, (before, after) = tmp_path / "run", workers
    interrupt(short_recipe(f"workers={before}"), out, *event)
    assert not same_run(out, uninterrupted)

    callback = RecordingCallback()
    resumed = train_recipe(
        short_recipe(f"workers={after}"), out, resume=True, callback=callback
    )

    assert resumed.num_epochs == 3

    # A stop at the end of an epoch resumes at the next one
    epoch = 3 if event[0] == "epoch" else event[1] + 1
    assert f", resumed at epoch {epoch};" in callback.events[1][1]["message"]
    assert same_run(out, uninterrupted)
    assert (out / "history.csv").read_text().count("\n") == 4


@pytest.mark.slow
def test_a_network_that_draws_random_numbers_resumes_to_the_same_bits(tmp_path) -> None:
    sizes = "blocks_per_stage=1, conv5_stride=1, components=4, chosen=2, component_widths=[6], gate_widths=[]"
    recipe = short_recipe(
        "model.name=gmsop-16-8-resnet18", f"model.config={{{sizes}}}", "epochs=1"
    )
    whole = train_recipe(recipe, tmp_path / "whole").out
    interrupt(recipe, tmp_path / "run", "step", 0, 2)

    assert same_run(train_recipe(recipe, tmp_path / "run", resume=True).out, whole)


def test_auto_overwrites_partial_files_only(tmp_path) -> None:
    (tmp_path / "last.pt.0123abcd.partial").write_bytes(b"half")
    (tmp_path / "best.pt").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="empty folder"):
        train_recipe(short_recipe(), tmp_path, resume="auto")
    assert (tmp_path / "best.pt").read_bytes() == b"mine"

    (tmp_path / "best.pt").unlink()
    assert train_recipe(short_recipe("epochs=1"), tmp_path, resume="auto").num_epochs == 1
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_restores_the_handlers(tmp_path, number) -> None:
    before, last = signal.getsignal(number), tmp_path / "run" / "last.pt"
    stopped = interrupt(short_recipe(), tmp_path / "run", "step", 1, 2, signal_number=number)
    message = f"stopped in epoch 2 of 3 after 3 steps of it; {last} is saved"

    assert (str(stopped), stopped.signal_number) == (message, number)
    assert signal.getsignal(number) == before

    checkpoint = read_checkpoint(last)
    assert (checkpoint.training["epoch"], checkpoint.training["step"]) == (1, 3)
    assert {path.name for path in last.parent.iterdir()} == FILES


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path) -> None:
    class Impatient(RecordingCallback):
        def on_step_end(self, **_) -> None:
            deliver(signal.SIGINT)
            deliver(signal.SIGINT)

    # Background processes ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_recipe(short_recipe(), tmp_path / "run", callback=Impatient())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run").exists()


class CheckpointWatcher(RecordingCallback):
    """Records the position in `last.pt` after each step."""

    def __init__(self, folder, *stop_at) -> None:
        super().__init__(stop_at)
        self.last, self.positions = folder / "last.pt", []

    def on_step_end(self, **progress) -> None:
        if self.last.exists():
            training = read_checkpoint(self.last).training
            self.positions.append((training["epoch"], training["step"]))
        super().on_step_end(**progress)


@pytest.mark.parametrize(("interval", "saved"), [(60, {(0, 3)}), (120, {(0, 2), (0, 4)})])
def test_checkpoints_are_written_every_few_minutes(
    tmp_path, monkeypatch, interval, saved
) -> None:
    clock = iter(range(0, 10_000, interval))  # seconds pass between two reads of the clock
    monkeypatch.setattr(
        run_folder, "time", SimpleNamespace(monotonic=lambda: float(next(clock)))
    )
    watcher = CheckpointWatcher(tmp_path / "run")
    train_recipe(
        short_recipe("epochs=1", "save.every_minutes=3"), tmp_path / "run", callback=watcher
    )

    assert set(watcher.positions) == saved


FULL = {
    "No space left on device": OSError(errno.ENOSPC, "No space left on device"),
    "the file is not complete": RuntimeError(
        "[enforce fail at inline_container.cc:672]"
    ),  # of torch.save
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", FULL)
def test_a_full_disk_leaves_the_checkpoints_before(
    reason, tmp_path, monkeypatch, uninterrupted
) -> None:
    out, save = tmp_path / "run", torch.save

    def fail_in_epoch_2(content, file) -> None:
        if content["training"]["epoch"] == 2:
            file.write(b"half a file")
            raise FULL[reason]
        save(content, file)

    monkeypatch.setattr(module.torch, "save", fail_in_epoch_2)
    with pytest.raises(StorageError, match=rf"last\.pt: .*\({reason}\)"):
        train_recipe(short_recipe(), out)
    monkeypatch.undo()
    assert not list(out.glob("*.partial"))
    assert read_checkpoint(out / "last.pt").training["epoch"] == 1
    train_recipe(short_recipe(), out, resume=True)
    assert same_run(out, uninterrupted)


TIMES = {"seconds", "images_per_second"}
COMMON = ("threads=1", "device=cpu", "epochs=4", "save.every_minutes=1e-9")
SMALL_GATE = "{components=4, chosen=2, component_widths=[16, 8], gate_widths=[16, 8], blocks_per_stage=1}"
REMOVED_BRANCHES = "dsop with removed branches and ema"

CASES = {
    "dsop with ema and lighting": (
        "ema={decay=0.9}",
        "color={lighting=0.1}",
        "loss.label_smoothing=0.1",
        "optimizer={kind='adamw', lr=0.003, clip_norm=5.0}",
    ),
    "gmsop with gate noise": (
        f"model={{name='gmsop-16-8-resnet18', config={SMALL_GATE}}}",
        "batch_size=52",
        "optimizer.lr=0.01",
    ),
    REMOVED_BRANCHES: (
        "ema={decay=0.9}",
        "model.remove_branches_at=3",
    ),
}

# Case, number of kills, seed
RUNS = [
    (REMOVED_BRANCHES, 2, 0),
    *(
        pytest.param(case, 10, seed, marks=pytest.mark.nightly)
        for case in CASES
        for seed in range(1, 3)
    ),
]


class StepPipe(Callback):
    """Writes a byte to a pipe after each step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_step_end(self, **_: Any) -> None:
        self.pipe.send_bytes(b".")


def run_child(out: Path, overrides: tuple[str, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    # Loader processes then end with the killed run
    multiprocessing.set_start_method("fork", force=True)
    with few_digits():
        train_recipe(short_recipe(*overrides), out, resume="auto", callback=StepPipe(pipe))


def run(out: Path, overrides: tuple[str, ...], *, steps: int = 0, delay: float = 0.0) -> int:
    """Train in a process that is killed *delay* seconds after *steps* steps; return its exit code."""
    reader, writer = forkserver().Pipe(duplex=False)
    child = forkserver().Process(target=run_child, args=(out, overrides, writer))
    child.start()
    writer.close()
    done = 0
    with suppress(EOFError):
        while reader.recv_bytes():
            done += 1
            if done == steps:
                time.sleep(delay)
                child.kill()
                break
    child.join()
    reader.close()
    assert child.exitcode is not None
    return child.exitcode


def history_without_times(out: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((out / "history.csv").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kills", "seed"), RUNS)
def test_sigkills_do_not_change_the_result(tmp_path, case, kills, seed) -> None:
    """The kills are within three steps, also in writes; the number of loader processes alternates."""
    overrides, random = COMMON + CASES[case], Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, overrides) == 0
    for number in range(kills):
        kill = {"steps": random.randint(1, 3), "delay": random.uniform(0, 0.02)}
        code = run(killed, (*overrides, f"workers={2 * (number % 2)}"), **kill)
        if code == 0:  # it ended before the kill
            break
        assert code == -signal.SIGKILL
    assert number > 0
    assert run(killed, overrides) == 0
    assert same_run(killed, whole)
    assert history_without_times(killed) == history_without_times(whole)

    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
    for name in names:
        if name.startswith("best"):
            found, expected = (read_checkpoint(out / name) for out in (killed, whole))
            assert same_bits(found.weights, expected.weights)
            assert found.config == expected.config

    if case == REMOVED_BRANCHES:
        check_removed_branches(whole)


def test_steps_with_different_penalties_are_read_together() -> None:
    run = object.__new__(state.LoopState)
    total, part = torch.tensor(3.0), torch.tensor(1.0)
    losses = [
        Loss(total, {"main": total}),
        Loss(total, {"main": part, "late": part}, torch.tensor([2, 5])),
    ]
    steps = [state.FinishedStep(loss, torch.tensor(0.5), torch.tensor(1), 4) for loss in losses]
    vars(run).update(
        strategy=SimpleNamespace(world=1),
        position=Position(step=2),
        unread=steps,
        updates=SimpleNamespace(scaler=torch.amp.GradScaler("cpu", enabled=False)),
    )

    assert run.read_steps() == [3, 3]
    assert run.position.sums == {"loss": 24, "main": 16, "late": 4}
    assert (run.position.seen, run.position.gradient, run.position.component_counts) == (
        8,
        4,
        (2, 5),
    )


def check_removed_branches(out: Path) -> None:
    """The branches must be gone from the weights, their average and the optimizer."""
    last = read_checkpoint(out / "last.pt")
    assert last.resume is not None
    for weights in (last.weights, last.resume["average"]["weights"]):
        assert not [name for name in weights if name.startswith("branches")]
    assert last.config["aux_blocks"] == [0, 0, 0]
    optimizer = last.resume["optimizer"]
    assert len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"])
    branch_losses = [bool(row["train_layer1_0"]) for row in history_without_times(out)]
    assert branch_losses == [True] * 3 + [False]


@pytest.mark.slow
@pytest.mark.parametrize("event", [None, ("step", 1, 2), ("epoch", 1, 0)], ids=str)
def test_steps_that_are_read_together_report_and_save_the_same(
    tmp_path, monkeypatch, uninterrupted, event
) -> None:
    monkeypatch.setitem(state.STEPS_PER_READ, "cpu", 4)  # an epoch has six steps
    out, callback = tmp_path / "run", RecordingCallback()
    if event is not None:
        stopped = str(interrupt(short_recipe("save.every_minutes=1e-9"), out, *event))
        assert ("4 steps" in stopped) == (event[0] == "step")

    train_recipe(short_recipe(), out, resume="auto", callback=callback)
    assert same_run(out, uninterrupted)

    steps = [
        values for name, values in callback.events if name == "step" and values["epoch"] == 2
    ]
    assert [values["step"] for values in steps] == list(range(6))

    single = RecordingCallback()
    monkeypatch.setitem(state.STEPS_PER_READ, "cpu", 1)
    train_recipe(short_recipe(), tmp_path / "single", callback=single)

    assert steps == [
        values for name, values in single.events if name == "step" and values["epoch"] == 2
    ]


def test_a_teacher_that_does_not_learn_is_in_evaluation_mode(uninterrupted) -> None:
    """The check that it can compute training images changes it."""
    teacher = f'teacher={{weights="{uninterrupted / "best.pt"}", temperature=2}}'
    run, _ = one_process_run(short_recipe(teacher))
    assert run.teacher is not None
    assert not run.teacher.model.training
