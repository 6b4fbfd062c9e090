"""Comparing recipes over the same seeds, and the statistics against published values and scipy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.statistics import student, wilson
from sopdeploy.recipe_comparison import NO_EFFECT, RecipeComparison, compare_recipes, compare_results
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.signals import TrainingStoppedError
from sopdeploy.training.start_weights import create_initial_model
from tests.sopdeploy.training.runs import RecordingCallback, same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

TINY = ["epochs=1", "batch_size=70", "model.config.base_width=2", "preprocess.resize=8", "preprocess.crop=8"]
PAIR = ["digits-plain", "digits-dsop"]


def compare_rows(**rows: tuple[str, ...]) -> RecipeComparison:
    """Compare recipes by one string per seed: `1` is correct, `0` is wrong."""
    correct = {name: np.array([list(row) for row in of_recipe]) == "1" for name, of_recipe in rows.items()}
    return compare_results(dict.fromkeys(rows, "net"), correct)


def test_three_seeds_computed_by_hand() -> None:
    found = compare_rows(a=("1100", "1000", "1010"), b=("1110", "1100", "1110"))
    assert (found.seeds, found.num_images) == ((0, 1, 2), 4)
    assert [arm.top1 for arm in found.arms] == [(0.5, 0.25, 0.5), (0.75, 0.5, 0.75)]
    (pair,) = found.pairs
    assert pair.differences == (0.25, 0.25, 0.25)
    assert (pair.mean, pair.sd, pair.low, pair.high) == (0.25, 0.0, 0.25, 0.25)
    assert (pair.wins, pair.ties, pair.losses) == (3, 0, 0)
    assert pair.verdict == "b is better than a by 25.00 points (+25.00 to +25.00)"


def test_every_other_recipe_is_compared_with_the_first_by_its_interval() -> None:
    found = compare_rows(a=("1100", "1100"), b=("1000", "1110"), c=("1100", "1100"), d=("0000", "0000"))
    assert [(pair.first, pair.second, pair.verdict) for pair in found.pairs] == [
        ("a", "b", NO_EFFECT),
        ("a", "c", NO_EFFECT),
        ("a", "d", "d is worse than a by 50.00 points (-50.00 to -50.00)"),
    ]


def test_a_network_with_and_without_branches_starts_with_the_same_backbone() -> None:
    branched = short_recipe("model.config.aux_dropout=0.0")
    plain = short_recipe("model.config.aux_dropout=0.0", "model.config.aux_blocks=[0,0,0]")
    labels, processes = open_data(plain.data).train.labels, Strategy(torch.device("cpu"))
    without, with_branches = (
        create_initial_model(recipe, labels, processes).model.state_dict() for recipe in (plain, branched)
    )
    assert all(torch.equal(with_branches[name], tensor) for name, tensor in without.items())


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, RecipeComparison, list[tuple[str, int]]]:
    """Return the folder and the result of a comparison over two seeds, and the reported runs."""
    started: list[tuple[str, int]] = []
    out = tmp_path_factory.mktemp("compare") / "out"
    return (
        out,
        compare_recipes(PAIR, out, seeds=2, overrides=TINY, on_run=lambda *run: started.append(run)),
        started,
    )


def test_a_finished_comparison_is_not_run_again(finished) -> None:
    out, found, started = finished
    assert started == [("digits-plain", 0), ("digits-dsop", 0), ("digits-plain", 1), ("digits-dsop", 1)]
    assert (found.num_images, len(found.pairs)) == (52, 1)
    stored = read_checkpoint(out / "digits-dsop" / "seed-1" / "last.pt")
    assert stored.training["seed"] == 1
    assert found.arms[1].top1[1] == pytest.approx(stored.training["metrics"]["top1"])
    written = {path: path.stat().st_mtime_ns for path in out.rglob("last.pt")}
    assert compare_recipes(PAIR, out, seeds=2, overrides=TINY) == found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("last.pt")} == written


def test_an_interrupted_comparison_continues_bit_for_bit(finished, tmp_path) -> None:
    stop = RecordingCallback(stop_at=("step", 0, 1))
    with pytest.raises(TrainingStoppedError):
        compare_recipes(PAIR, tmp_path / "out", seeds=2, overrides=TINY, callback=stop)
    assert compare_recipes(PAIR, tmp_path / "out", seeds=2, overrides=TINY) == finished[1]
    last = Path("digits-plain", "seed-0", "last.pt")
    first, second = (read_checkpoint(folder / last).weights for folder in (tmp_path / "out", finished[0]))
    assert same_bits(first, second)


@pytest.mark.parametrize(
    ("sources", "seeds", "message"),
    [
        (["digits-plain"], 5, "at least two recipes"),
        (["digits-plain", "digits-plain"], 5, "two recipes have the name digits-plain"),
        (PAIR, 1, "at least 2 seeds"),
        (["digits-plain", "cifar10-dsop-resnet20"], 2, "have different data"),
    ],
)
def test_invalid_comparisons_are_refused_before_anything_runs(sources, seeds, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_recipes(sources, tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()


DIFFERENCES = st.floats(-1, 1, allow_nan=False, allow_subnormal=False)


@settings(deadline=None, max_examples=20)
@given(st.lists(DIFFERENCES, min_size=2, max_size=30))
def test_a_paired_interval_is_that_of_the_t_test(differences) -> None:
    found = student(differences)
    if np.std(differences) < 1e-9:
        assert found == pytest.approx((np.mean(differences),) * 2, abs=1e-8)
        return
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_wilson_agrees_with_scipy(successes, failures) -> None:
    found = wilson(successes, successes + failures)
    if successes + failures == 0:
        assert found == (0.0, 1.0)
        return
    expected = stats.binomtest(successes, successes + failures).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-7)
