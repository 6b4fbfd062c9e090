"""The exponential moving average of the weights, alone and in a run."""

import copy

import pytest
import torch
from torch import nn

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.training.ema import EmaConfig, ExponentialMovingAverage
from sopdeploy.training.loop import train
from tests.sopdeploy.training.runs import same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def change(model: nn.Module) -> None:
    """Change all weights and buffers, including the integer one."""
    model.train()
    model(torch.randn(5, 3) + 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def test_floating_point_tensors_are_averaged_and_integers_copied() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    ema = ExponentialMovingAverage(EmaConfig(decay=0.9, warmup=False), model)
    change(model)
    ema.update(model)
    after = model.state_dict()
    for name, mean in ema.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert int(mean) == int(after[name]) == 1
        else:
            torch.testing.assert_close(mean, 0.9 * before[name] + 0.1 * after[name])
    assert ema.count == 1
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (9, 10 / 19), (1000, 0.99)])
def test_the_decay_grows_with_the_number_of_updates(updates, decay) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = ExponentialMovingAverage(EmaConfig(decay=0.99), model)
    ema.count = updates - 1
    with torch.no_grad():
        ema.model.weight.zero_()
        model.weight.fill_(1.0)
    ema.update(model)
    assert float(ema.model.weight) == pytest.approx(1 - decay)


def test_the_update_count_is_part_of_the_state() -> None:
    model = network()
    first, second = (ExponentialMovingAverage(EmaConfig(), model) for _ in range(2))
    for _ in range(3):
        change(model)
        first.update(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.count == 3
    for ema in (first, second):
        ema.update(model)
    assert same_bits(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("export", ["average", "raw"])
def test_a_run_evaluates_both_weights_and_exports_the_configured_ones(tmp_path, export) -> None:
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
