"""The gain programs: intervals of draws that share test images, and the choice of learning rates."""

from types import SimpleNamespace

import numpy as np
import pytest
from gain.execution import Lines, choose_rates, neighbor
from gain.paired import crossed, paired
from gain.study import Study
from gain.task import DigitsConfig
from gain.train_and_measure import DIVERGED, Run

from sopdeploy.errors import ConfigError
from tests.docs.reading import ROOT


def test_without_effects_of_images_the_interval_is_that_of_independent_answers() -> None:
    random = np.random.default_rng(0)
    ours, other = random.random((2, 8, 4000)) < np.array([0.7, 0.6])[:, None, None]
    expected = paired(*(100 * side.mean(axis=1) for side in (ours, other)))
    found = crossed(ours.astype(float), other.astype(float))
    assert (found.n, found.mean, found.wins) == (8, pytest.approx(expected.mean), expected.wins)
    assert found.half == pytest.approx(
        2.36 * 100 * np.sqrt((0.21 + 0.24) / (8 * 4000)), rel=0.2
    )


def test_images_that_all_draws_answer_alike_widen_the_interval() -> None:
    shared = np.random.default_rng(1).random(100) < 0.3  # only ours is right, in every draw
    ours, other = np.tile(shared, (5, 1)).astype(float), np.zeros((5, 100))
    found = crossed(ours, other)
    error = 100 * shared.std(ddof=1) / 10
    assert found.half == pytest.approx(1.96 * error, rel=0.15)
    assert paired(100 * ours.mean(axis=1), 100 * other.mean(axis=1)).half == 0.0
    tested = np.where(np.arange(100) < 50, ours, np.nan)
    assert crossed(tested, other).mean == pytest.approx(100 * shared[:50].mean())


def study_of(rates: tuple[float, ...]) -> Study:
    return Study(
        name="s",
        images="i",
        title="",
        seeds=(),
        template={"task": DigitsConfig(), "network": "resnet", "epochs": 1},
        arms={"a": {}},
        rates=rates,
        search=("a",),
    )


@pytest.mark.parametrize(
    ("best", "given", "expected"),
    [(0.1, (0.03, 0.1, 0.3), 0.1), (3.0, (0.03, 0.1, 0.3), 3.0), (0.003, (0.03, 0.1), 0.003)],
)
def test_a_grid_grows_until_the_best_rate_is_not_on_its_edge(best, given, expected) -> None:
    def run(planned):
        rates = [one.learning_rate for _, _, one in planned]
        return [
            SimpleNamespace(accuracy=-abs(np.log(rate / best)), log_loss=rate) for rate in rates
        ]

    lines = SimpleNamespace(run=run, may_run=True)
    assert choose_rates(study_of(given), lines, (100, 101), 1) == {"a": expected}


def test_a_report_keeps_a_grid_whose_widening_was_interrupted(capsys) -> None:
    def run(planned):
        runs = [one for _, _, one in planned]
        if any(one.learning_rate > 0.1 and one.seed > 100 for one in runs):
            raise ConfigError("has no draw 101")
        return [SimpleNamespace(accuracy=one.learning_rate, log_loss=0.0) for one in runs]

    lines = SimpleNamespace(run=run, may_run=False)
    assert choose_rates(study_of((0.03, 0.1)), lines, (100, 101), 1) == {"a": 0.1}
    assert capsys.readouterr().err == "s: a: the best rate is on the edge of the grid\n"


def test_a_rate_that_is_far_behind_is_not_tried_on_the_other_draws() -> None:
    tried = []

    def run(planned):
        runs = [one for _, _, one in planned]
        tried.extend((one.learning_rate, one.seed) for one in runs)
        accuracies = {0.01: 70.0, 0.03: 90.0, 0.1: 9.0}
        return [
            SimpleNamespace(accuracy=accuracies[one.learning_rate], log_loss=0.0)
            for one in runs
        ]

    lines = SimpleNamespace(run=run, may_run=True)
    assert choose_rates(study_of((0.01, 0.03, 0.1)), lines, (100, 101), 1) == {"a": 0.03}
    assert tried == [(0.01, 100), (0.03, 100), (0.1, 100), (0.01, 101), (0.03, 101)]


def test_a_rate_with_which_training_diverges_has_a_line_that_can_be_read(tmp_path) -> None:
    config = {"depth": 8, "base_width": 2}
    task = DigitsConfig(train=20)
    run = Run(
        task=task,
        network="resnet",
        config=config,
        epochs=1,
        batch=5,
        learning_rate=1e30,
        seed=0,
    )
    planned = [("i", "a", run)]
    lines = Lines(tmp_path / "lines")
    (line,) = lines.run(planned)
    assert (line.loss, line.log_loss) == (DIVERGED, None)
    assert Lines(tmp_path / "lines", may_run=False).run(planned) == [line]


def test_rates_are_one_and_three_times_powers_of_ten() -> None:
    assert [neighbor(rate, below=False) for rate in (0.03, 0.1, 3e-4)] == [0.1, 0.3, 1e-3]
    assert [neighbor(rate, below=True) for rate in (0.03, 0.1, 1e-3)] == [0.01, 0.03, 3e-4]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "benchmarks").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_the_lines_of_the_pages_are_read(path) -> None:
    assert Lines(path, may_run=False).by_run
