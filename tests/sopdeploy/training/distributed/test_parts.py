"""Parts of training in several processes, each alone, with the other processes played by the test."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.errors import ConfigError
from sopdeploy.layers.distributed import FrozenBatchNorm, GlobalBatchNorm, Rows, RowsDropout
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed import data_parallel as gradients
from sopdeploy.training.distributed import torchrun as joined
from sopdeploy.training.distributed.batch_sharding import shard_layers
from sopdeploy.training.distributed.strategy import SingleProcess
from sopdeploy.training.run import create_run
from tests.sopdeploy.training.distributed.cases import NETWORKS, pictures, recipe_of

CPU = torch.device("cpu")


class Beside(SingleProcess):
    """One of two processes; the other one's numbers are the same plus *more*."""

    world = 2

    def __init__(self, more: float) -> None:
        super().__init__(CPU)
        self.more = more

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values + self.more


def test_a_gradient_missing_here_counts_as_zero_and_one_missing_everywhere_stays_missing(monkeypatch) -> None:
    likes = [torch.zeros(2, 2), torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(1)]
    here = [torch.ones(2, 2).t(), None, torch.full((4,), 2.0, dtype=torch.float64), None]
    there = [torch.full((4,), 10.0), torch.full((3,), 5.0), torch.full((4,), 7.0, dtype=torch.float64)]
    theirs = iter([torch.tensor([1, 1, 1, 0], dtype=torch.int32), torch.cat(there[:2]), there[2]])
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda tensor: tensor.add_(next(theirs)))
    sums = gradients.DataParallel.all_reduce_list(None, here, likes)
    assert [None if each is None else each.unique().tolist() for each in sums] == [[11.0], [5.0], [9.0], None]
    assert next(theirs, None) is None


def test_large_gradients_travel_in_pieces_of_one_type(monkeypatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 40)
    tensors = [
        torch.zeros(n, dtype=t) for n, t in [(4, torch.float32), (6, torch.float32), (1, torch.float32)]
    ]
    tensors += [torch.zeros(1, dtype=torch.float64), torch.zeros(99)]
    assert [[len(each) for each in bucket] for bucket in gradients._buckets(tensors)] == [
        [4, 6],
        [1],
        [1],
        [99],
    ]


KINDS = [
    ("local", 2, None),
    ("global", 1, None),
    ("global", 2, GlobalBatchNorm),
    ("frozen", 1, FrozenBatchNorm),
]


@pytest.mark.parametrize(("kind", "world", "expected"), KINDS)
@pytest.mark.parametrize("name", ["dsop-resnet8", "gmsop-16-8-resnet18", "isqrt-resnet18", "timm:resnet18"])
def test_a_network_keeps_its_names_whatever_its_batch_norms_become(name, kind, world, expected) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=3)
        keys, parameters = list(network.state_dict()), list(network.parameters())
        shard_layers(network, kind, world, Rows())
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    assert list(network.state_dict()) == keys
    assert all(mine is theirs for mine, theirs in zip(network.parameters(), parameters, strict=True))
    assert norms
    assert all(
        isinstance(norm, expected) if expected else type(norm) is not GlobalBatchNorm for norm in norms
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_everything_that_draws_knows_the_rows(network) -> None:
    run = create_run(recipe_of(network, "sgd"), pictures(), SingleProcess(CPU))
    drawing = [module for module in run.model.modules() if hasattr(module, "rows")]
    assert any(isinstance(module, RowsDropout) for module in drawing)
    assert all(module.rows is run.strategy.shard_rng for module in drawing)


@pytest.mark.parametrize("kind", ["local", "global"])
def test_running_statistics_of_each_process_are_averaged_and_common_ones_left_alone(kind) -> None:
    run = create_run(recipe_of("dsop", "sgd", f"batch_norm={kind}", "ema={}"), pictures(), Beside(6.0))
    run.synchronize_buffers()
    assert run.ema is not None
    for model in (run.model, run.ema.model):
        assert model.get_buffer("bn1.running_mean").unique().tolist() == [3.0 if kind == "local" else 0.0]
        assert int(model.get_buffer("bn1.num_batches_tracked")) == 0


def test_processes_that_go_on_from_different_steps_are_refused(tmp_path) -> None:
    joined.check_same_step(create_run(recipe_of("dsop", "sgd"), pictures(), Beside(0.0)), tmp_path)
    with pytest.raises(ConfigError, match="different checkpoints; put --out on a disk that all"):
        joined.check_same_step(create_run(recipe_of("dsop", "sgd"), pictures(), Beside(1.0)), tmp_path)


def test_a_line_is_told_once_and_not_after_the_process_that_tells_has_gone() -> None:
    store = dist.HashStore()
    told = [joined._is_reported(store, line) for line in ("a", "b", "a")]
    assert told == [False, False, True]

    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("no answer")

    assert joined._is_reported(Gone(), "c")


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU of its own, there are 2"):
        joined._local_device()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert joined._local_device() == 1


@pytest.mark.parametrize(
    ("problem", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_only_a_lost_process_is_called_lost(problem, lost) -> None:
    assert joined._is_lost_connection(problem) is lost
