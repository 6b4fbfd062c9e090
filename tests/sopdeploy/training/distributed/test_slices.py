import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sopdeploy.errors import ConfigError
from sopdeploy.training.distributed.batch_sharding import check_divisible, shard_step
from sopdeploy.training.distributed.data_parallel import DataParallel
from sopdeploy.training.distributed.strategy import SingleProcess
from tests.sopdeploy.training.distributed.cases import recipe_of


class OneOf(DataParallel):
    """One of several processes, of which there is only this one."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 8),
    world=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    mixup=st.sampled_from([0.0, 0.3]),
    spare=st.integers(0, 4),
)
def test_processes_compute_each_sample_of_a_step_once_beside_its_neighbour(
    steps, world, accumulate, mixup, spare
) -> None:
    samples = [10 * place for place in range(max(2, world) * accumulate * steps + spare)]
    recipe = recipe_of("dsop", "sgd", f"accumulate={accumulate}", f"mix.mixup={mixup}", "batch_size=600")
    alone = shard_step(samples, recipe, SingleProcess(torch.device("cpu")))
    assert alone.samples == samples
    slices = [shard_step(samples, recipe, OneOf(rank, world)) for rank in range(world)]
    seen = []
    for number, whole in enumerate(alone.micro_batches):
        together = []
        for share in slices:
            piece = share.micro_batches[number]
            assert piece.total == whole.total
            together += share.samples[piece.first : piece.end]
            assert piece.end > piece.first
            if mixup and world > 1:
                before = samples[samples.index(share.samples[piece.first]) - 1]
                assert share.samples[piece.first - 1] == before
        assert together == samples[whole.first : whole.end]
        seen += together
    assert seen == samples


@pytest.mark.parametrize(
    ("settings_", "count", "world", "message"),
    [
        ([], 52, 4, "batch_size: a step of 14 samples cannot be divided among 4 processes; .*multiple of 4"),
        ([], 15, 14, "batch_size: steps of 7 samples in 1 micro-batches leave some of 14 processes without"),
        (["accumulate=7"], 52, 2, "steps of 13 samples in 7 micro-batches leave some of 2 processes without"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(settings_, count, world, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_divisible(recipe_of("dsop", "sgd", *settings_), count, world)
    check_divisible(recipe_of("dsop", "sgd"), 52, 2)
