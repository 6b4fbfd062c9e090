"""Figures for other programs: told by name, forgotten where a resumed run does them again."""

import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.training.callbacks import CallbackList, loggers
from sopdeploy.training.loop import train
from tests.sopdeploy.training.runs import Onlooker, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


class Writer:
    """Stands in for TensorBoard's and for Weights & Biases' run."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        self.scalars: dict[tuple[str, int], float] = {}
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def log(self, figures: dict[str, float], step: int) -> None:
        self.scalars |= {(name, step): value for name, value in figures.items()}

    def flush(self) -> None:
        """Do nothing."""


@pytest.fixture(autouse=True)
def nothing_made():
    Writer.made.clear()


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Writer))


def test_both_are_told_every_epoch_beside_the_one_who_looks_on(monkeypatch, tmp_path) -> None:
    installed(monkeypatch)
    out, onlooker = tmp_path / "run", Onlooker()
    several = CallbackList([*loggers(["tensorboard", "wandb"], out), onlooker])
    result = train(short_recipe("epochs=2"), out, progress=several)
    board, sent = Writer.made
    assert board.arguments == (str(out / "tensorboard"),)
    assert board.options == {"purge_step": 1}
    assert (sent.options["name"], sent.options["resume"]) == ("run", "allow")
    assert board.scalars == sent.scalars
    assert {step for _, step in board.scalars} == {1, 2}
    names = {name for name, _ in board.scalars}
    wanted = {
        "train/main",
        "held_out/top1",
        "heads/layer1_0_top1",
        "course/waiting",
        "course/lr",
        "course/gradient",
    }
    assert wanted <= names
    assert board.scalars["held_out/top1", 2] == result.last_top1
    assert [name for name, _ in onlooker.told].count("finished") == 2


def test_a_board_forgets_what_a_resumed_run_does_again(monkeypatch, tmp_path) -> None:
    installed(monkeypatch)
    (board,) = loggers(["tensorboard"], tmp_path)
    board.started(epochs=9, first_epoch=4, train_count=1, held_out_count=1)
    assert Writer.made[0].options == {"purge_step": 5}


def test_a_logger_that_is_not_installed_or_not_known_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name, source in (("wandb", "wandb"), ("tensorboard", r"sopdeploy\[tensorboard\]")):
        with pytest.raises(
            ConfigError, match=f'^--log {name}: {name} is not installed; run: pip install "{source}"$'
        ):
            loggers([name], tmp_path)
    with pytest.raises(ConfigError, match="--log x: none of tensorboard, wandb"):
        loggers(["x"], tmp_path)


def test_tensorboard_itself_reads_what_was_written(tmp_path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (board,) = loggers(["tensorboard"], tmp_path)
    history = train(short_recipe("epochs=1"), tmp_path / "run", progress=board)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (value,) = found.Scalars("held_out/top1")
    assert (value.step, value.value) == (1, pytest.approx(history.last_top1))
