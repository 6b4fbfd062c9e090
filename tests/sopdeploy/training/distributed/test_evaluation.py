"""A set of 103 pictures is measured alike by one, two and three processes: none is padded, none left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.evaluation.prediction import SingleProcessGroup, evaluate
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed.data_parallel import DataParallel
from sopdeploy.training.distributed.strategy import select_device
from tests.sopdeploy.training.distributed import ranks

RULES = Preprocess(resize=8, crop=8)
COUNT, CLASSES = 103, 7


def measured(processes=None, batch_size: int = 10) -> dict[str, float]:
    """Return counts and the sum of losses of a fixed network, and how often progress was told."""
    torch.manual_seed(0)
    network = create_model("dsop-resnet8", num_classes=CLASSES, base_width=4)
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    stored = ArrayImages(tuple("abcdefg"), images, random.integers(0, CLASSES, COUNT))
    told: list[int] = []
    processes = processes or DataParallel(select_device("cpu"))
    found = evaluate(
        network,
        PreprocessedDataset(stored, RULES),
        RULES,
        batch_size=batch_size,
        processes=processes,
        on_batch=told.append,
    )
    right = {"top1": round(found.top1 * COUNT), "top5": round(found.top5 * COUNT), "count": found.count}
    return {**right, "loss": found.loss * found.count, "told": len(told), "last": told[-1]}


def shared(_folder: Path) -> dict[str, float]:
    """Return what one of several processes gets."""
    return measured()


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_measures_the_same(tmp_path, world) -> None:
    alone = measured(SingleProcessGroup())
    found = ranks.run_in_processes(f"{__name__}:shared", tmp_path, world=world)
    assert all(each == found[0] for each in found)
    assert [found[0][key] for key in ("top1", "top5", "count")] == [
        alone[key] for key in ("top1", "top5", "count")
    ]
    assert found[0]["loss"] == pytest.approx(alone["loss"], rel=1e-9)
    assert (found[0]["told"], found[0]["last"]) == (-(-COUNT // (10 * world)), COUNT)
