import copy

import pytest
import torch
from torch import nn

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import ConfigError
from sopdeploy.training.ema import EmaChoice, ExponentialMovingAverage
from sopdeploy.training.loop import train
from tests.sopdeploy.training.runs import same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def learn(model: nn.Module) -> None:
    """Change weights and buffers, the integer one too."""
    model.train()
    model(torch.randn(5, 3) + 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def test_floating_tensors_are_averaged_and_integers_copied() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    average = ExponentialMovingAverage(EmaChoice(decay=0.9, warmup=False), model)
    learn(model)
    average.update(model)
    after = model.state_dict()
    for name, mean in average.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(mean) == int(after[name]) == 1
        else:
            torch.testing.assert_close(mean, 0.9 * before[name] + 0.1 * after[name])
    assert average.count == 1


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (9, 10 / 19), (1000, 0.99)])
def test_the_decay_grows_with_the_number_of_updates(updates, decay) -> None:
    model = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(EmaChoice(decay=0.99), model)
    average.count = updates - 1
    with torch.no_grad():
        average.model.weight.zero_()
        model.weight.fill_(1.0)
    average.update(model)
    assert float(average.model.weight) == pytest.approx(1 - decay)


def test_the_count_is_part_of_the_state() -> None:
    model = network()
    average, again = (ExponentialMovingAverage(EmaChoice(), model) for _ in range(2))
    for _ in range(3):
        learn(model)
        average.update(model)
    again.load_state_dict(copy.deepcopy(average.state_dict()))
    assert again.count == 3
    for follower in (average, again):
        follower.update(model)
    assert same_bits(average.state_dict(), again.state_dict())


def test_the_average_learns_nothing_by_itself() -> None:
    assert not any(
        parameter.requires_grad
        for parameter in ExponentialMovingAverage(EmaChoice(), network()).model.parameters()
    )


@pytest.mark.parametrize("export", ["average", "raw"])
def test_figures_stand_side_by_side_and_the_checkpoint_carries_those_of_the_recipe(tmp_path, export) -> None:
    result = train(short_recipe(f"ema={{decay=0.8, export='{export}'}}"), tmp_path / "run")
    header = result.history.read_text().splitlines()[0].split(",")
    assert [name for name in header if "top1" in name][:3] == ["top1", "raw_top1", "average_top1"]
    best, last = read_checkpoint(result.best), read_checkpoint(result.last)
    assert last.resume is not None
    assert best.training["weights"] == last.training["weights"] == export
    raw, average = last.resume["weights"], last.resume["average"]["weights"]
    assert not same_bits(raw, average)
    assert same_bits(last.weights, average if export == "average" else raw)
    row = last.resume["position"]["history"][-1]
    assert row["figures"] == row[export]
    assert last.training["figures"] == row[export]


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        short_recipe("ema={decay=1.0}")
