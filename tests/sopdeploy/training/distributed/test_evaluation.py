"""Evaluation of 103 images gives the same result with one, two and three processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.evaluation.prediction import SingleProcessGroup, evaluate
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed.data_parallel import DataParallel
from tests.sopdeploy.training.distributed.processes import run_in_processes

PREPROCESS = Preprocess(resize=8, crop=8)
COUNT, CLASSES, BATCH_SIZE = 103, 7, 10


def evaluate_fixed_network(group) -> dict[str, float]:
    """Return the counts and the summed loss of a fixed network, and the progress reports."""
    torch.manual_seed(0)
    network = create_model("dsop-resnet8", num_classes=CLASSES, base_width=4)
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    dataset = ArrayImages(tuple("abcdefg"), images, random.integers(0, CLASSES, COUNT))
    progress: list[int] = []
    found = evaluate(
        network,
        PreprocessedDataset(dataset, PREPROCESS),
        PREPROCESS,
        batch_size=BATCH_SIZE,
        processes=group,
        on_batch=progress.append,
    )
    counts = {"top1": round(found.top1 * COUNT), "top5": round(found.top5 * COUNT), "count": found.count}
    return {**counts, "loss": found.loss * found.count, "reports": len(progress), "last": progress[-1]}


def evaluate_shard(_folder: Path) -> dict[str, float]:
    """Evaluate in one of several processes."""
    return evaluate_fixed_network(DataParallel(torch.device("cpu")))


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_gives_the_same_result(tmp_path, world) -> None:
    single = evaluate_fixed_network(SingleProcessGroup())
    found, *others = run_in_processes(f"{__name__}:evaluate_shard", tmp_path, world=world)
    assert all(other == found for other in others)
    assert all(found[key] == single[key] for key in ("top1", "top5", "count"))
    assert found["loss"] == pytest.approx(single["loss"], rel=1e-9)
    assert (found["reports"], found["last"]) == (-(-COUNT // (BATCH_SIZE * world)), COUNT)
