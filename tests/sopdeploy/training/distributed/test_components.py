"""Distributed training against one process, and its components with the other processes simulated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import ProcessGroup, evaluate_network
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed import Strategy, check_batch_size
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.setup import check_same_step
from tests.sopdeploy.training.distributed.cases import (
    SHORT_CASES,
    build_recipe,
    dataset,
    several_classes,
)
from tests.sopdeploy.training.distributed.processes import run_in_processes
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


@given(samples=st.lists(st.integers(), max_size=40), world=st.integers(1, 5))
def test_the_processes_compute_each_sample_of_a_step_once(samples, world) -> None:
    shards = [fake_process(rank, world).shard(samples) for rank in range(world)]
    assert [sample for shard in shards for sample in shard] == samples
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(
    ("count", "world", "message"),
    [
        (
            52,
            4,
            "14 samples .*4 processes",
        ),
        (2, 7, "2 samples .*7 processes"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(count, world, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batch_size(build_recipe("dsop", "sgd"), count, world)
    check_batch_size(build_recipe("dsop", "sgd"), 52, 2)


def test_running_statistics_of_batch_norms_are_averaged() -> None:
    recipe = build_recipe("dsop", "sgd", "ema={}")
    processes = TwoProcesses(CPU)
    processes.offset = 6.0
    run = start_run(recipe, dataset(), processes)
    run.synchronize_buffers()

    assert run.average is not None
    for model in (run.model, run.average.model):
        assert model.get_buffer("bn1.running_mean").unique().tolist() == [3.0]
        assert int(model.get_buffer("bn1.num_batches_tracked")) == 0


def test_processes_that_resume_from_different_steps_are_refused(tmp_path) -> None:
    processes = TwoProcesses(CPU)
    folder = RunFolder(tmp_path, processes)
    run = start_run(build_recipe("dsop", "sgd"), dataset(), processes)
    check_same_step(run.setup, folder)
    processes.offset = 1.0

    with pytest.raises(ConfigError, match="different checkpoints"):
        check_same_step(run.setup, folder)


Results = dict[str, dict[str, Tensor]]
PREPROCESS = Preprocess(resize=8, crop=8)
COUNT, CLASSES, BATCH_SIZE = 103, 7, 10


def run_short_cases(_folder: Path | None = None) -> Results:
    return {name: case() for name, case in SHORT_CASES.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[Results]:
    folder = tmp_path_factory.mktemp("two")
    return run_in_processes(f"{__name__}:run_short_cases", folder, world=2)


@pytest.fixture(scope="module")
def one_process() -> Results:
    return run_short_cases()


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest difference between tensors with the same name."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT_CASES)
def test_two_processes_learn_the_same_as_one(name, one_process, two_processes) -> None:
    bound = 1e-6 if "float32" in name else 1e-10
    assert largest_difference(one_process[name], two_processes[0][name]) <= bound
    assert largest_difference(two_processes[0][name], two_processes[1][name]) == 0


class ManyClasses:
    """Images with several classes each."""

    is_multi_label = True

    def __init__(self, images: ArrayImages) -> None:
        self.images, self.labels = images, images.labels
        self.targets = several_classes(images).targets

    def __len__(self) -> int:
        return len(self.targets)

    def preprocess(self, index: int, *rules):
        return self.images.preprocess(index, *rules)


def evaluate_fixed_network(group) -> dict[str, float]:
    """Return the counts and the summed loss of a fixed network, and the progress reports.

    The network is evaluated for one class per image, then for several.
    """
    torch.manual_seed(0)
    network = create_model("dsop-resnet8", num_classes=CLASSES, base_width=4)
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    dataset = ArrayImages(tuple("abcdefg"), images, random.integers(0, CLASSES, COUNT))
    held_out, progress = PreprocessedDataset(dataset, PREPROCESS), []
    options = {"batch_size": BATCH_SIZE, "processes": group, "on_batch": progress.append}
    found = evaluate_network(network, held_out, PREPROCESS, **options)
    counts = {
        "top1": round(found.top1 * COUNT),
        "top5": round(found.top5 * COUNT),
        "count": found.count,
    }
    multi_label = evaluate_network(
        network, PreprocessedDataset(ManyClasses(dataset), PREPROCESS), PREPROCESS, **options
    )
    counts |= {
        "map": multi_label.map,
        "thresholds": multi_label.thresholds,
        "several loss": multi_label.loss,
    }
    return {
        **counts,
        "loss": found.loss * found.count,
        "reports": len(progress),
        "last": progress[-1],
    }


def evaluate_shard(_folder: Path) -> dict[str, float]:
    return evaluate_fixed_network(Strategy(torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_any_number_of_processes_evaluates_103_images_equally(tmp_path, world) -> None:
    single = evaluate_fixed_network(ProcessGroup())
    found, *others = run_in_processes(f"{__name__}:evaluate_shard", tmp_path, world=world)
    assert all(other == found for other in others)
    assert all(found[key] == single[key] for key in ("top1", "top5", "count", "map"))
    for name in ("loss", "several loss", "thresholds"):
        assert found[name] == pytest.approx(single[name], rel=1e-9)
    assert (found["reports"], found["last"]) == (2 * -(-COUNT // (BATCH_SIZE * world)), COUNT)
