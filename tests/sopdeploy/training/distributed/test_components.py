"""Components of distributed training, with the other processes simulated: sharding, sums, layers, errors."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.errors import ConfigError
from sopdeploy.layers.distributed import FrozenBatchNorm, GlobalBatchNorm, ShardedDropout, ShardRng
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed import strategy, torchrun
from sopdeploy.training.distributed.batch_sharding import check_divisible, shard_layers, shard_step
from sopdeploy.training.distributed.strategy import SingleProcess
from sopdeploy.training.run import create_run
from tests.sopdeploy.training.distributed.cases import NETWORKS, build_recipe, dataset

CPU = torch.device("cpu")


class TwoProcesses(SingleProcess):
    """One of two processes; the values of the other one are those of this one plus *offset*."""

    world, offset = 2, 0.0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values + self.offset


def fake_process(rank: int, world: int) -> SingleProcess:
    """Build the strategy of one of *world* processes without the others."""
    process = SingleProcess(CPU)
    process.rank, process.world = rank, world
    return process


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 8),
    world=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    mixup=st.sampled_from([0.0, 0.3]),
    extra=st.integers(0, 4),
)
def test_the_processes_compute_each_sample_of_a_step_once(steps, world, accumulate, mixup, extra) -> None:
    samples = [10 * index for index in range(max(2, world) * accumulate * steps + extra)]
    recipe = build_recipe("dsop", "sgd", f"accumulate={accumulate}", f"mix.mixup={mixup}", "batch_size=600")
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
            if mixup and world > 1:  # the neighbor that the first sample is mixed with
                assert shard.samples[first - 1] == samples[samples.index(shard.samples[first]) - 1]
        assert micro_batch == samples[whole.first : whole.end]
        computed += micro_batch
    assert computed == samples


@pytest.mark.parametrize(
    ("overrides", "count", "world", "message"),
    [
        ([], 52, 4, "a step of 14 samples cannot be divided among 4 processes; choose a multiple of 4"),
        ([], 15, 14, "batch_size: steps of 7 samples in 1 micro-batches leave some of 14 processes without"),
        (["accumulate=7"], 52, 2, "steps of 13 samples in 7 micro-batches leave some of 2 processes without"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(overrides, count, world, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_divisible(build_recipe("dsop", "sgd", *overrides), count, world)
    check_divisible(build_recipe("dsop", "sgd"), 52, 2)


def test_a_missing_gradient_counts_as_zero_unless_all_processes_miss_it(monkeypatch) -> None:
    likes = [torch.zeros(2, 2), torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(1)]
    here = [torch.ones(2, 2).t(), None, torch.full((4,), 2.0, dtype=torch.float64), None]
    there = [torch.full((4,), 10.0), torch.full((3,), 5.0), torch.full((4,), 7.0, dtype=torch.float64)]
    added = iter([torch.tensor([1, 1, 1, 0], dtype=torch.int32), torch.cat(there[:2]), there[2]])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(next(added)))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    sums = strategy.DataParallel(CPU).all_reduce_list(here, likes)
    assert [None if each is None else each.unique().tolist() for each in sums] == [[11.0], [5.0], [9.0], None]
    assert next(added, None) is None


def test_gradients_are_reduced_in_buckets_of_one_dtype(monkeypatch) -> None:
    monkeypatch.setattr(strategy, "BUCKET_BYTES", 40)
    tensors = [torch.zeros(4), torch.zeros(6), torch.zeros(1)]
    tensors += [torch.zeros(1, dtype=torch.float64), torch.zeros(99)]
    buckets = [[len(tensor) for tensor in bucket] for bucket in strategy._buckets(tensors)]
    assert buckets == [[4, 6], [1], [1], [99]]


@pytest.mark.parametrize(
    ("kind", "world", "expected"),
    [("local", 2, None), ("global", 1, None), ("global", 2, GlobalBatchNorm), ("frozen", 1, FrozenBatchNorm)],
)
@pytest.mark.parametrize("name", ["dsop-resnet8", "gmsop-16-8-resnet18", "isqrt-resnet18", "timm:resnet18"])
def test_replaced_batch_norms_keep_names_and_parameters(name, kind, world, expected) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=3)
        keys, parameters = list(network.state_dict()), list(network.parameters())
        shard_layers(network, kind, world, ShardRng())
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    assert list(network.state_dict()) == keys
    assert all(new is old for new, old in zip(network.parameters(), parameters, strict=True))
    assert norms
    if expected:
        assert all(isinstance(norm, expected) for norm in norms)
    else:
        assert not any(type(norm) is GlobalBatchNorm for norm in norms)


@pytest.mark.parametrize("network", NETWORKS)
def test_all_layers_with_random_numbers_share_the_generator(network) -> None:
    run = create_run(build_recipe(network, "sgd"), dataset(), SingleProcess(CPU))
    layers = [module for module in run.model.modules() if hasattr(module, "shard_rng")]
    assert any(isinstance(module, ShardedDropout) for module in layers)
    assert all(module.shard_rng is run.strategy.shard_rng for module in layers)


@pytest.mark.parametrize(("kind", "mean"), [("local", 3.0), ("global", 0.0)])
def test_running_statistics_of_local_batch_norms_are_averaged(kind, mean) -> None:
    recipe = build_recipe("dsop", "sgd", f"batch_norm={kind}", "ema={}")
    processes = TwoProcesses(CPU)
    processes.offset = 6.0
    run = create_run(recipe, dataset(), processes)
    run.synchronize_buffers()
    assert run.ema is not None
    for model in (run.model, run.ema.model):
        assert model.get_buffer("bn1.running_mean").unique().tolist() == [mean]
        assert int(model.get_buffer("bn1.num_batches_tracked")) == 0


def test_processes_that_resume_from_different_steps_are_refused(tmp_path) -> None:
    processes = TwoProcesses(CPU)
    run = create_run(build_recipe("dsop", "sgd"), dataset(), processes)
    torchrun.check_same_step(run, tmp_path)
    processes.offset = 1.0
    with pytest.raises(ConfigError, match="find different checkpoints; put --out on a disk that all"):
        torchrun.check_same_step(run, tmp_path)


def test_errors_are_reported_once_and_lost_connections_are_distinguished() -> None:
    store, gone = dist.HashStore(), Mock(add=Mock(side_effect=dist.DistNetworkError("no reply")))
    assert [torchrun._is_reported(store, message) for message in ("a", "b", "a")] == [False, False, True]
    assert torchrun._is_reported(gone, "c")
    closed = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    lost = [RuntimeError(closed), dist.DistBackendError("NCCL error: remote process exited")]
    others = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.OutOfMemoryError("CUDA")]
    assert all(map(torchrun._is_lost_connection, lost))
    assert not any(map(torchrun._is_lost_connection, others))


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU of its own, there are 2"):
        torchrun._local_device()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torchrun._local_device() == 1


def test_restarts_are_counted_on_one_machine_only(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torchrun._attempt() == "0"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert torchrun._attempt() == "1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert torchrun._attempt() == "0"
