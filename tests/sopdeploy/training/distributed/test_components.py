"""Components of distributed training, with the other processes simulated: sharding, sums, layers, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sopdeploy.errors import ConfigError
from sopdeploy.training.distributed import torchrun
from sopdeploy.training.distributed.batch_sharding import check_divisible, shard_step
from sopdeploy.training.distributed.strategy import Strategy
from tests.sopdeploy.training.distributed.cases import build_recipe, dataset
from tests.sopdeploy.training.runs import start_run

CPU = torch.device("cpu")


class TwoProcesses(Strategy):
    """One of two processes; the values of the other one are those of this one plus *offset*."""

    world, offset = 2, 0.0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values + self.offset


def fake_process(rank: int, world: int) -> Strategy:
    """Build the strategy of one of *world* processes without the others."""
    process = Strategy(CPU)
    process.rank, process.world = rank, world
    return process


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 8),
    world=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    extra=st.integers(0, 4),
)
def test_the_processes_compute_each_sample_of_a_step_once(steps, world, accumulate, extra) -> None:
    samples = [10 * index for index in range(max(2, world) * accumulate * steps + extra)]
    recipe = build_recipe("dsop", "sgd", f"accumulate={accumulate}", "batch_size=600")
    single = shard_step(samples, recipe, fake_process(0, 1))
    assert single.samples == samples
    shards = [shard_step(samples, recipe, fake_process(rank, world)) for rank in range(world)]
    computed = []
    for number, whole in enumerate(single.micro_batches):
        micro_batch = []
        for shard in shards:
            first, end, total = shard.micro_batches[number]
            assert total == whole.total
            assert end > first
            micro_batch += shard.samples[first:end]
        assert micro_batch == samples[whole.first : whole.end]
        computed += micro_batch
    assert computed == samples


@pytest.mark.parametrize(
    ("overrides", "count", "world", "message"),
    [
        ([], 52, 4, "a step of 14 samples cannot be divided among 4 processes; choose a multiple of 4"),
        (["accumulate=7"], 52, 2, "steps of 13 samples in 7 micro-batches leave some of 2 processes without"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(overrides, count, world, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_divisible(build_recipe("dsop", "sgd", *overrides), count, world)
    check_divisible(build_recipe("dsop", "sgd"), 52, 2)


@pytest.mark.parametrize(("kind", "mean"), [("local", 3.0), ("global", 0.0)])
def test_running_statistics_of_local_batch_norms_are_averaged(kind, mean) -> None:
    recipe = build_recipe("dsop", "sgd", f"batch_norm={kind}", "ema={}")
    processes = TwoProcesses(CPU)
    processes.offset = 6.0
    run = start_run(recipe, dataset(), processes)
    run.synchronize_buffers()
    assert run.ema is not None
    for model in (run.model, run.ema.model):
        assert model.get_buffer("bn1.running_mean").unique().tolist() == [mean]
        assert int(model.get_buffer("bn1.num_batches_tracked")) == 0


def test_processes_that_resume_from_different_steps_are_refused(tmp_path) -> None:
    processes = TwoProcesses(CPU)
    run = start_run(build_recipe("dsop", "sgd"), dataset(), processes)
    torchrun.check_same_step(run, tmp_path)
    processes.offset = 1.0
    with pytest.raises(ConfigError, match="find different checkpoints; use a disk that all"):
        torchrun.check_same_step(run, tmp_path)
