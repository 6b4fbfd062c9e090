"""TensorBoard and Weights & Biases receive the metrics of every epoch."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.training.callbacks import CallbackList, create_loggers
from sopdeploy.training.loop import train
from tests.sopdeploy.training.runs import RecordingCallback, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


class FakeWriter:
    """Replaces TensorBoard's writer and a run of Weights & Biases."""

    def __init__(self, created: list["FakeWriter"], *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        self.scalars: dict[tuple[str, int], float] = {}
        created.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.scalars |= {(name, step): value for name, value in metrics.items()}

    def flush(self) -> None:
        """Do nothing."""


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    """Install fake loggers and return the list of created writers."""
    created: list[FakeWriter] = []
    create = partial(FakeWriter, created)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=create))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=create))
    return created


def test_both_loggers_receive_every_epoch(writers, tmp_path) -> None:
    out, callback = tmp_path / "run", RecordingCallback()
    callbacks = CallbackList([*create_loggers(["tensorboard", "wandb"], out), callback])
    result = train(short_recipe("epochs=2"), out, callback=callbacks)
    board, wandb = writers
    assert board.arguments == (str(out / "tensorboard"),)
    assert board.options == {"purge_step": 1}
    assert (wandb.options["name"], wandb.options["resume"]) == ("run", "allow")
    assert board.scalars == wandb.scalars
    assert {step for _, step in board.scalars} == {1, 2}
    expected = {"train/main", "held_out/top1", "heads/layer1_0_top1"}
    expected |= {"course/waiting", "course/lr", "course/gradient"}
    assert expected <= {name for name, _ in board.scalars}
    assert board.scalars["held_out/top1", 2] == result.last_top1
    assert [name for name, _ in callback.events].count("epoch") == 2
    (again,) = create_loggers(["tensorboard"], tmp_path)
    again.on_train_start(epochs=9, first_epoch=4, train_count=1, held_out_count=1)
    assert writers[-1].options == {"purge_step": 5}  # a resumed run purges the epochs that run again


def test_a_missing_or_unknown_logger_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name, source in (("wandb", "wandb"), ("tensorboard", r"sopdeploy\[tensorboard\]")):
        message = f'^--log {name}: {name} is not installed; run: pip install "{source}"$'
        with pytest.raises(ConfigError, match=message):
            create_loggers([name], tmp_path)
    with pytest.raises(ConfigError, match="--log x: none of tensorboard, wandb"):
        create_loggers(["x"], tmp_path)


def test_tensorboard_can_read_the_event_files(tmp_path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (board,) = create_loggers(["tensorboard"], tmp_path)
    result = train(short_recipe("epochs=1"), tmp_path / "run", callback=board)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (value,) = found.Scalars("held_out/top1")
    assert (value.step, value.value) == (1, pytest.approx(result.last_top1))
