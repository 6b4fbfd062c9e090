"""A checkpoint knows its training images."""

from pathlib import Path

import pytest

import sopdeploy
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.painted import SMALL, paint

LOOP = [
    "epochs=1",
    "batch_size=8",
    "model.config.base_width=2",
    "data.kind=folder",
    "preprocess.resize=8",
    "preprocess.crop=8",
]


@pytest.mark.parametrize(("recipe", "settings"), [("digits-plain", LOOP), ("photos", SMALL)])
def test_measuring_on_training_images_is_a_warning(tmp_path: Path, recipe: str, settings: list[str]) -> None:
    seen = paint(tmp_path / "seen", 20)
    result = train_recipe(read_recipe(recipe, [*settings, f"data.path={seen}"]), tmp_path / "run")
    stored = read_checkpoint(result.best)
    count = stored.training["procedure"].get("class_counts", {"all": result.train_count})
    assert len(stored.image_hashes) == sum(count.values())
    found = sopdeploy.evaluate(result.best, seen)
    assert found.notes == (
        f"{seen}: {len(stored.image_hashes)} of 60 images are training images of this network, so that these "
        "figures are too high for new images",
    )
    assert sopdeploy.evaluate(result.best, paint(tmp_path / "new", 2, seed=1)).notes == ()
    fitted = sopdeploy.evaluate(result.best, seen, fit_decision=tmp_path / "fitted.pt")
    assert fitted.notes == found.notes
    assert read_checkpoint(tmp_path / "fitted.pt").image_hashes.equal(stored.image_hashes)
