"""Diagnostics of heads, which must not change the run."""

import numpy as np
import pytest
import torch

from sopdeploy import create_model
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.diagnostics import diagnose
from sopdeploy.training.run import Position
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.runs import short_recipe

PREPROCESS = Preprocess(resize=16, crop=16)
NORMALIZE = Normalize(PREPROCESS)


def dataset(count: int = 7) -> PreprocessedDataset:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return PreprocessedDataset(ArrayImages(("a", "b", "c"), images, np.arange(count) % 3), PREPROCESS)


def inputs() -> torch.Tensor:
    return NORMALIZE(torch.from_numpy(np.stack([image for image, _ in (dataset()[i] for i in range(7))])))


@pytest.fixture
def branched():
    torch.manual_seed(0)
    return create_model("dsop-resnet8", num_classes=3, base_width=4)


def test_every_head_is_evaluated_and_the_model_is_unchanged(branched) -> None:
    before = {name: tensor.clone() for name, tensor in branched.state_dict().items()}
    random_state = torch.random.get_rng_state()
    found = diagnose(branched, dataset(), NORMALIZE, 3)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert branched.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in branched.state_dict().items())
    assert set(found.heads) == {"main", "layer1_0", "layer2_0", "layer3_0"}
    labels = torch.arange(7) % 3
    logits = branched.eval()(inputs()).detach()
    assert found.heads["main"].top1 == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert found.heads["main"].loss == pytest.approx(loss, rel=1e-5)
    assert found.num_images == 7


@pytest.mark.usefixtures("few_digits")
def test_a_run_records_diagnostics_and_throughput(tmp_path) -> None:
    result = train_recipe(short_recipe("epochs=2"), tmp_path / "run")
    stored = read_checkpoint(result.last)
    assert stored.resume is not None
    for row in Position.model_validate(stored.resume["position"]).history:
        assert row.diagnostics is not None
        assert row.speed is not None
        assert (row.gradient or 0) > 0
        assert row.speed.images_per_second > 0
        assert row.diagnostics.num_images == 52
        assert row.diagnostics.heads["main"].top1 == pytest.approx(row.metrics.top1)
        assert row.diagnostics.heads["main"].loss == pytest.approx(row.metrics.loss, rel=1e-4)
    header = result.history.read_text().splitlines()[0].split(",")
    assert {
        "gradient",
        "data_fraction",
        "images_per_second",
        "layer1_0_top1",
        "layer1_0_top5",
        "main_loss",
    } <= set(header)
