"""Recipes over the same seeds: what pairs have in common, that a stopped comparison goes on, what is said."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.comparison import Comparison
from sopdeploy.comparison import runs as compare
from sopdeploy.comparison.runs import start_weights, train_from
from sopdeploy.comparison.verdict import NO_EFFECT, Results, judge
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError
from sopdeploy.training.distributed.strategy import SingleProcess, choose_device
from sopdeploy.training.run import start_run
from sopdeploy.training.signals import TrainingStoppedError
from tests.sopdeploy.training.runs import Onlooker, same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

TINY = ["epochs=1", "batch_size=120", "model.config.base_width=2", "preprocess.resize=8", "preprocess.crop=8"]
PAIR = ["digits-plain", "digits-dsop"]


def results(name: str, *rows: str) -> Results:
    """Return results written as one word per seed: `1` right, `0` wrong."""
    right = np.asarray([[letter == "1" for letter in row] for row in rows])
    return Results(name=name, model="net", right=right)


def test_three_seeds_by_hand() -> None:
    found = judge(range(3), [results("a", "1100", "1000", "1010"), results("b", "1110", "1100", "1110")])
    assert (found.seeds, found.pictures) == ((0, 1, 2), 4)
    assert [arm.top1 for arm in found.arms] == [(0.5, 0.25, 0.5), (0.75, 0.5, 0.75)]
    (pair,) = found.pairs
    assert pair.differences == (0.25, 0.25, 0.25)
    assert (pair.mean, pair.sd, pair.low, pair.high) == (0.25, 0.0, 0.25, 0.25)
    assert (pair.wins, pair.ties, pair.losses) == (3, 0, 0)
    assert [(one.only_first, one.only_second, one.p) for one in pair.mcnemar] == [(0, 1, 1.0)] * 3
    assert pair.verdict == "b is better than a by 25.00 points (+25.00 to +25.00)"
    assert 0 <= pair.bootstrap_low <= 0.25 <= pair.bootstrap_high


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        (("1000", "1110"), NO_EFFECT),
        (("1100", "1100"), NO_EFFECT),
        (("0000", "0000"), "b is worse than a by 50.00 points (-50.00 to -50.00)"),
    ],
)
def test_the_verdict_follows_the_interval(second, verdict) -> None:
    assert judge(range(2), [results("a", "1100", "1100"), results("b", *second)]).pairs[0].verdict == verdict


def test_every_other_recipe_is_compared_with_the_first() -> None:
    found = judge(range(2), [results(name, "10", "01") for name in "abc"])
    assert [(pair.first, pair.second) for pair in found.pairs] == [("a", "b"), ("a", "c")]
    assert {pair.verdict for pair in found.pairs} == {NO_EFFECT}


def test_a_pair_begins_with_the_same_backbone_and_its_own_branches(tmp_path) -> None:
    branched, plain = (
        short_recipe("model.config.aux_dropout=0.0", *rest)
        for rest in ((), ("model.config.aux_blocks=[0,0,0]",))
    )
    data = open_data(plain.data)
    donor = start_weights(plain, data)
    stop = Onlooker(stop_at=("stepped", 0, 0))
    with pytest.raises(TrainingStoppedError):
        train_from(donor, branched, tmp_path / "run", data, stop)
    previous = read_checkpoint(tmp_path / "run" / "previous.pt")  # what it began with
    assert {name for name in previous.weights if name not in donor} == {
        name for name in previous.weights if name.startswith("branches.")
    }
    assert all(torch.equal(previous.weights[name], tensor) for name, tensor in donor.items())
    own = start_run(branched, data.train, SingleProcess(choose_device("cpu"))).model.state_dict()
    assert all(torch.equal(previous.weights[n], own[n]) for n in own if n.startswith("branches."))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, list[tuple[str, int]]]:
    """Return the folder of a comparison of two seeds, what it said, and the runs it told of."""
    told: list[tuple[str, int]] = []
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(PAIR, out, seeds=2, overrides=TINY, on_run=lambda *run: told.append(run)), told


def test_a_comparison_runs_every_pair_counts_the_last_epoch_and_is_not_run_twice(whole) -> None:
    out, found, told = whole
    assert told == [("digits-plain", 0), ("digits-dsop", 0), ("digits-plain", 1), ("digits-dsop", 1)]
    assert json.loads((out / "plan.json").read_text()) == {"recipes": PAIR, "seeds": 2}
    assert (found.pictures, len(found.pairs)) == (91, 1)
    stored = read_checkpoint(out / "digits-dsop" / "seed-1" / "last.pt")
    assert stored.training["seed"] == 1
    assert found.arms[1].top1[1] == pytest.approx(stored.training["figures"]["top1"])
    written = {path: path.stat().st_mtime_ns for path in out.rglob("last-right.npy")}
    again = compare(PAIR, out, seeds=2, overrides=TINY)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("last-right.npy")} == written
    for path in written:
        path.unlink()
    assert compare(PAIR, out, seeds=2, overrides=TINY) == found
    with pytest.raises(ConfigError, match="another comparison began here"):
        compare(PAIR, out, seeds=3, overrides=TINY)


def test_a_stopped_comparison_goes_on_bit_for_bit(whole, tmp_path) -> None:
    stop = Onlooker(stop_at=("stepped", 0, 1), signal_number=signal.SIGINT)
    with pytest.raises(TrainingStoppedError):
        compare(PAIR, tmp_path / "stopped", seeds=2, overrides=TINY, progress=stop)
    assert compare(PAIR, tmp_path / "stopped", seeds=2, overrides=TINY) == whole[1]
    place = Path("digits-plain", "seed-0", "last.pt")
    ends = [read_checkpoint(folder / place) for folder in (tmp_path / "stopped", whole[0])]
    assert same_bits(ends[0].weights, ends[1].weights)


@pytest.mark.parametrize(
    ("sources", "seeds", "message"),
    [
        (["digits-plain"], 5, "two recipes at least"),
        (["digits-plain", "digits-plain"], 5, "two recipes are called digits-plain"),
        (PAIR, 1, "2 seeds at least"),
        (["digits-plain", "cifar10-dsop-resnet20"], 2, "have other data"),
    ],
)
def test_what_cannot_be_paired_is_refused_before_anything_runs(sources, seeds, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(sources, tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_damaged_is_named(tmp_path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match=r"plan\.json: cannot be used"):
        compare(PAIR, tmp_path, seeds=2, overrides=TINY)
