"""Training on few real photographs, from ImageNet weights."""

from pathlib import Path

import sopdeploy
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.training.results import FewShotResult
from tests.real.conftest import LITE0


def test_eight_photographs_of_each_class_are_enough_for_clothes(
    photos: Path, lite0_file: Path, tmp_path: Path
) -> None:
    run = sopdeploy.train(photos, out=tmp_path / "run", weights=lite0_file, **{"model.name": LITE0})

    assert isinstance(run.procedure, FewShotResult)
    assert run.procedure.top1 is not None
    assert run.procedure.top1.count == 32
    assert run.procedure.top1.share > 0.85
    assert run.procedure.head == f"{LITE0} gap+isqrt of blocks.4, blocks.6"
    checkpoint = read_checkpoint(run.best)
    assert checkpoint.labels == ("dress", "hat", "pants", "shoes")
