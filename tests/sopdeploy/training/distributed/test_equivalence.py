"""Several processes compute what one process computes with the whole batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.evaluation.prediction import ProcessGroup, evaluate_network
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed.strategy import Strategy
from tests.sopdeploy.training.distributed.cases import (
    LONG_CASES,
    SHORT_CASES,
    several_classes,
)
from tests.sopdeploy.training.distributed.processes import run_in_processes

Results = dict[str, dict[str, Tensor]]
PREPROCESS = Preprocess(resize=8, crop=8)
COUNT, CLASSES, BATCH_SIZE = 103, 7, 10


def run_short_cases(_folder: Path | None = None) -> Results:
    return {name: case() for name, case in SHORT_CASES.items()}


def run_long_cases(_folder: Path | None = None) -> Results:
    return {name: case() for name, case in LONG_CASES.items()}


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


@pytest.mark.parametrize("name", SHORT_CASES)
def test_two_processes_learn_the_same_as_one(name, one_process, two_processes) -> None:
    bound = 1e-6 if "float32" in name else 1e-10
    assert largest_difference(one_process[name], two_processes[0][name]) <= bound
    assert largest_difference(two_processes[0][name], two_processes[1][name]) == 0


@pytest.mark.slow
def test_a_hundred_steps_are_the_same(tmp_path) -> None:
    first, second = run_in_processes(f"{__name__}:run_long_cases", tmp_path, world=2)
    found = {name: largest_difference(state, first[name]) for name, state in run_long_cases().items()}
    assert max(found.values()) <= 1e-10, found
    assert all(largest_difference(first[name], second[name]) == 0 for name in found)


class ManyClasses:
    """Images with several classes each."""

    def __init__(self, images: ArrayImages) -> None:
        self.images, self.labels = images, images.labels
        self.targets = several_classes(images).targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.images[index][0], self.targets[index]


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
    counts = {"top1": round(found.top1 * COUNT), "top5": round(found.top5 * COUNT), "count": found.count}
    multi_label = evaluate_network(
        network, PreprocessedDataset(ManyClasses(dataset), PREPROCESS), PREPROCESS, **options
    )
    counts |= {"map": multi_label.map, "thresholds": multi_label.thresholds, "several loss": multi_label.loss}
    return {**counts, "loss": found.loss * found.count, "reports": len(progress), "last": progress[-1]}


def evaluate_shard(_folder: Path) -> dict[str, float]:
    return evaluate_fixed_network(Strategy(torch.device("cpu")))


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_evaluates_103_images_equally(tmp_path, world) -> None:
    single = evaluate_fixed_network(ProcessGroup())
    found, *others = run_in_processes(f"{__name__}:evaluate_shard", tmp_path, world=world)
    assert all(other == found for other in others)
    assert all(found[key] == single[key] for key in ("top1", "top5", "count", "map"))
    for name in ("loss", "several loss", "thresholds"):
        assert found[name] == pytest.approx(single[name], rel=1e-9)
    assert (found["reports"], found["last"]) == (2 * -(-COUNT // (BATCH_SIZE * world)), COUNT)
