"""Complete runs in two processes: stopping, resuming in one process, errors and killed processes."""

import os
import signal
import time
from pathlib import Path

import pytest

from sopdeploy.training.distributed import TrainingStoppedError
from sopdeploy.training.loop import run as loop
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.data.folders.test_folder import make
from tests.sopdeploy.training.distributed.processes import (
    held_port,
    run_in_processes,
    start_module,
    wait_for,
)
from tests.sopdeploy.training.runs import short_recipe
from tests.support.children import children_of

pytestmark = pytest.mark.usefixtures("few_digits")


class RecordingLoader:
    """Replaces `load_batches` and records the samples of each step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.load = loop.load_batches

    def __call__(self, dataset, batches, workers, device):
        for samples, batch in zip(
            batches, self.load(dataset, batches, workers, device), strict=True
        ):
            self.steps.append(list(samples))
            yield batch


def train_until_signal(folder: Path) -> list[list[int]]:
    """Train until a signal to the second process in the second epoch; return the loaded samples."""
    loader = loop.load_batches = RecordingLoader()
    check = loop.SignalState.exchange

    def check_with_signal(self, **options: bool) -> None:
        if os.environ["RANK"] == "1" and len(loader.steps) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        check(self, **options)

    loop.SignalState.exchange = check_with_signal
    with pytest.raises(TrainingStoppedError, match="epoch 2 of 3"):
        train_recipe(short_recipe("epochs=3"), folder / "run")
    return loader.steps


def test_a_signal_to_one_process_stops_both_and_one_process_resumes(
    tmp_path, monkeypatch
) -> None:
    shards = run_in_processes(f"{__name__}:train_until_signal", tmp_path, world=2)
    assert [len(steps) for steps in shards] == [8, 8]

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"best.pt", "history.csv", "last.pt", "recipe.toml", "run.json"}

    resumed, single = RecordingLoader(), RecordingLoader()
    monkeypatch.setattr(loop, "load_batches", resumed)
    result = train_recipe(short_recipe("epochs=3"), tmp_path / "run", resume=True)

    assert result.num_epochs == 3

    monkeypatch.setattr(loop, "load_batches", single)
    train_recipe(short_recipe("epochs=3"), tmp_path / "single")
    before = [first + second for first, second in zip(*shards, strict=True)]

    assert before + resumed.steps == single.steps


def train_command(out: Path, *overrides: str) -> list[str]:
    small = [
        "batch_size=240",
        "model.config.base_width=4",
        "preprocess.resize=8",
        "preprocess.crop=8",
    ]
    settings = [word for override in [*small, *overrides] for word in ("--set", override)]
    return ["train", "--recipe", "digits-dsop", "--out", str(out), *settings]


@pytest.mark.nightly
def test_a_killed_process_ends_the_other_one_with_one_line(tmp_path) -> None:
    command = train_command(tmp_path / "run", "epochs=400")
    with start_module("sopdeploy", *command, world=2) as processes:
        first, second = processes
        assert first.stderr is not None
        lines = [first.stderr.readline() for _ in range(3)]
        second.kill()
        (code, out, err), (killed, _, silent) = wait_for(processes)

    assert lines[0].startswith("network: dsop-resnet8 (")
    assert lines[1].startswith("1438 training images, 359 validation images;")
    assert lines[2].startswith("epoch   1/40")
    assert (code, killed, out, silent) == (2, -signal.SIGKILL, "", "")

    (error,) = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert error.startswith("error: another process ")
    assert read_checkpoint(tmp_path / "run" / "last.pt").resume is not None


@pytest.mark.nightly
def test_an_error_of_a_process_ends_both_with_one_line_each(tmp_path) -> None:
    make(tmp_path / "photos", a=8, b=8)
    (tmp_path / "photos" / "a" / "000.jpg").write_bytes(b"no image")
    photos = f"data={{kind='folder', path='{tmp_path / 'photos'}'}}"
    command = train_command(tmp_path / "run", photos, "batch_size=4")
    with start_module("sopdeploy", *command, world=2) as processes:
        results = wait_for(processes)

    assert [code for code, _, _ in results] == [2, 2]

    errors = [
        line for _, _, err in results for line in err.splitlines() if line.startswith("error")
    ]
    assert len(errors) == 2
    # The other one lost its connection
    assert sum("photos/a/000.jpg" in line for line in errors) == 1
    assert "Traceback" not in "".join(err for _, _, err in results)


@pytest.mark.nightly
def test_torchrun_restarts_a_killed_process_and_one_process_prints(tmp_path) -> None:
    command = train_command(tmp_path / "run", "epochs=12", "device=cpu")
    command = ["-m", "sopdeploy", *command, "--resume", "auto", "--json"]
    last = tmp_path / "run" / "last.pt"
    with held_port() as port:
        options = ["--max-restarts", "1", "--nproc-per-node", "2", "--master-port", str(port)]
        with start_module("torch.distributed.run", *options, *command, world=1) as processes:
            deadline = time.monotonic() + 120
            while not last.exists():
                assert time.monotonic() < deadline, f"{last} was not written"
                time.sleep(0.05)
            paths = {
                child: Path(f"/proc/{child}/environ") for child in children_of(processes[0].pid)
            }
            (second,) = (
                child for child, path in paths.items() if b"\0RANK=1\0" in path.read_bytes()
            )
            os.kill(second, signal.SIGKILL)
            ((code, out, error),) = wait_for(processes)

    assert code == 0, error
    assert out.count('"best_epoch"') == 1
    assert read_checkpoint(last).training["epoch"] == 12
