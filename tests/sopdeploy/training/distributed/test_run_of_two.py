"""A whole run in two processes: what it leaves, how it is stopped, resumed by one alone, and how it dies."""

import os
import signal
import time
from pathlib import Path

import pytest
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.training import loop as training
from sopdeploy.training.distributed.torchrun import _attempt
from sopdeploy.training.signals import TrainingStoppedError
from tests.ports import held_port
from tests.sopdeploy.data.test_data_folder import make
from tests.sopdeploy.training.distributed import ranks
from tests.sopdeploy.training.runs import short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

GLOBAL = "batch_norm=global"


class Order:
    """Writes down which samples are loaded, step by step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.load = training.load_batches

    def __call__(self, dataset, batches, workers, device):
        for samples, batch in zip(batches, self.load(dataset, batches, workers, device), strict=True):
            self.steps.append(list(samples))
            yield batch


def stopped(folder: Path) -> list[list[int]]:
    """Train until the second process alone gets a signal in the second epoch; return what was loaded."""
    order = training.load_batches = Order()
    second = os.environ["RANK"] == "1"
    check = training.SignalState.check

    def signal_at_last(self, **wishes: bool) -> None:
        if second and len(order.steps) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        check(self, **wishes)

    training.SignalState.check = signal_at_last
    with pytest.raises(TrainingStoppedError, match="stopped in epoch 2 of 3 after 2 steps"):
        training.train(short_recipe(GLOBAL, "epochs=3"), folder / "run")
    return order.steps


def test_a_signal_to_one_process_stops_both_and_one_process_goes_on_with_the_same_samples(
    tmp_path, monkeypatch
) -> None:
    shares = ranks.run_in_processes(f"{__name__}:stopped", tmp_path, world=2)
    assert [len(steps) for steps in shares] == [8, 8]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.pt",
        "history.csv",
        "last.pt",
        "previous.pt",
    ]
    resumed, undisturbed = Order(), Order()
    monkeypatch.setattr(training, "load_batches", resumed)
    result = training.train(short_recipe(GLOBAL, "epochs=3"), tmp_path / "run", resume=True)
    assert result.epochs == 3
    monkeypatch.setattr(training, "load_batches", undisturbed)
    training.train(short_recipe(GLOBAL, "epochs=3"), tmp_path / "alone")
    shown = [first + second for first, second in zip(*shares, strict=True)] + resumed.steps
    assert shown == undisturbed.steps
    network = build_classifier(read_checkpoint(result.best), result.best)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    assert {type(norm).__module__ for norm in norms} == {"torch.nn.modules.batchnorm"}


def command(out: Path, *settings: str) -> list[str]:
    """Return the arguments of a short run on the command line."""
    small = ["batch_size=240", "model.config.base_width=4", "preprocess.resize=8", "preprocess.crop=8"]
    given = [word for setting in [*small, *settings] for word in ("--set", setting)]
    return ["train", "--recipe", "digits-dsop", "--out", str(out), *given]


def test_a_process_that_is_killed_ends_the_other_with_one_line(tmp_path) -> None:
    with ranks.started("sopdeploy", *command(tmp_path / "run", "epochs=400"), world=2) as both:
        assert both[0].stderr is not None
        started = both[0].stderr.readline()
        first_epoch = both[0].stderr.readline()
        both[1].kill()
        (code, out, err), (killed, _, silence) = ranks.ends_of(both)
    assert (started, first_epoch[:12]) == ("1438 training images, 359 held out\n", "epoch   1/40")
    assert (code, killed, out, silence) == (2, -signal.SIGKILL, "", "")
    lines = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: another process of the run ended, see its message; continue")
    assert read_checkpoint(tmp_path / "run" / "last.pt").resume is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_size=63", "batch_size: a step of 63 samples cannot be divided among 2 processes"),
        ("epochz=3", "epochz: unknown key; did you mean epochs?"),
        ("optimizer.lr=1e30", "is not finite; lower optimizer.lr"),
    ],
)
def test_what_both_find_is_said_once(tmp_path, setting, message) -> None:
    with ranks.started("sopdeploy", *command(tmp_path / "run", setting), world=2) as both:
        ends = ranks.ends_of(both)
    assert [code for code, _, _ in ends] == [2, 2]
    lines = [line for _, _, err in ends for line in err.splitlines() if "training images" not in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.slow
def test_a_picture_that_only_one_process_reads_is_named_once(tmp_path) -> None:
    make(tmp_path / "photos", a=8, b=8)
    (tmp_path / "photos" / "a" / "000.jpg").write_bytes(b"no picture")
    words = ["train", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), "--set", "epochs=1"]
    with ranks.started("sopdeploy", *words, world=2) as both:
        ends = ranks.ends_of(both)
    assert [code for code, _, _ in ends] == [2, 2]
    lines = [line for _, _, err in ends for line in err.splitlines() if line.startswith("error")]
    assert sum("photos/a/000.jpg" in line for line in lines) == 1
    assert len(lines) <= 2
    assert "Traceback" not in "".join(err for _, _, err in ends)


@pytest.mark.parametrize(
    ("here", "all_of_them", "restarts", "expected"),
    [("2", "2", "1", "1"), ("2", "2", None, "0"), ("2", "4", "1", "0")],
)
def test_processes_of_one_machine_meet_anew_after_each_restart(
    monkeypatch, here, all_of_them, restarts, expected
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", all_of_them)
    if restarts is None:
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert _attempt() == expected


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed_and_only_one_process_speaks(tmp_path) -> None:
    settings = ("epochs=12", GLOBAL, "device=cpu")
    words = ["-m", "sopdeploy", *command(tmp_path / "run", *settings), "--resume", "auto", "--json"]
    last = tmp_path / "run" / "last.pt"
    with held_port() as port:
        run = ["--max-restarts", "1", "--nproc-per-node", "2", "--master-port", str(port)]
        with ranks.started("torch.distributed.run", *run, *words, world=1) as processes:
            wait_for(last)
            os.kill(worker_of(processes[0].pid), signal.SIGKILL)
            ((code, out, error),) = ranks.ends_of(processes)
    assert code == 0, error
    assert out.count('"best_epoch"') == 1
    assert read_checkpoint(last).training["epoch"] == 12


def wait_for(path: Path, seconds: float = 120.0) -> None:
    """Return when *path* is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


def worker_of(parent: int) -> int:
    """Return a process that *parent* started and that trains."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            is_child = f"\nPPid:\t{parent}\n" in status.read_text()
            if is_child and "RANK=1" in (status.parent / "environ").read_text().split("\0"):
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError("no second process")
