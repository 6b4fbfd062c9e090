"""Images that cannot be read: all named at once, or left out before the first step."""

import re
from pathlib import Path

import pytest

from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.data.sources import open_data
from sopdeploy.errors import DataError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.signals import TrainingStoppedError
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.data.small_data import jpeg, write_photos
from tests.sopdeploy.training.runs import RecordingCallback, same_run

MODEL = ["model.name=dsop-resnet8", "model.config={aux_widths=[8,8,8], iterations=2}"]
SMALL = [*MODEL, "preprocess.resize=20", "preprocess.crop=16", "batch_size=3", "epochs=2"]


@pytest.fixture
def spoilt(tmp_path) -> Path:
    """Write photos with three unreadable files: two for training, one held out."""
    root = write_photos(tmp_path / "photos")
    (root / "train" / "cat" / "1.jpg").write_bytes(b"no image")
    (root / "train" / "dog" / "2.jpg").write_bytes(jpeg(1)[:-300])
    (root / "val" / "dog" / "0.jpg").write_bytes(b"")
    return root


def recipe_for(path: Path, *settings: str):
    return read_recipe("photos-dsop", [*SMALL, f"data.path={path}", *settings])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_and_names_all_unreadable_images(spoilt, tmp_path, workers) -> None:
    with pytest.raises(DataError) as problem:
        train_recipe(recipe_for(spoilt, f"workers={workers}"), tmp_path / "run")
    text = str(problem.value)
    assert text.startswith("3 images cannot be used (set data.skip_corrupt=true to leave them out, ")
    assert re.search(
        "train/cat/1.jpg: this is not.*; .*train/dog/2.jpg: the image.*; .*val/dog/0.jpg: this is not", text
    )
    assert "\n" not in text
    met = DataError("a/5.jpg: cannot be read")  # a single unreadable image keeps its own error
    assert unreadable_images_error(met, open_data(recipe_for(spoilt).data).held_out) is met


def test_skipped_images_are_counted_and_named_and_an_evaluation_names_them(spoilt, tmp_path) -> None:
    callback = RecordingCallback()
    result = train_recipe(recipe_for(spoilt, "data.skip_corrupt=true"), tmp_path / "run", callback=callback)
    assert (result.train_count, result.held_out_count) == (6, 3)
    files = ("train/cat/1.jpg", "train/dog/2.jpg", "val/dog/0.jpg")
    assert result.skipped == tuple(str(spoilt / name) for name in files)
    (warning,) = [facts["warning"] for event, facts in callback.events if event == "warning"]
    assert warning.startswith("3 unreadable images are left out: ")
    with pytest.raises(DataError, match="2 images cannot be used"):
        score_checkpoint(result.best, spoilt / "train")


def test_a_run_resumes_bit_for_bit_unless_an_image_was_repaired(spoilt, tmp_path) -> None:
    recipe = recipe_for(spoilt, "data.skip_corrupt=true")
    train_recipe(recipe, tmp_path / "whole")
    for name in ("parts", "changed"):
        with pytest.raises(TrainingStoppedError):
            train_recipe(recipe, tmp_path / name, callback=RecordingCallback(stop_at=("step", 1, 0)))
    train_recipe(recipe, tmp_path / "parts", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    (spoilt / "train" / "cat" / "1.jpg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match="started with 6 training images, now there are 7"):
        train_recipe(recipe, tmp_path / "changed", resume=True)


def test_a_class_without_readable_images_is_named(spoilt) -> None:
    for file in (spoilt / "val" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no readable image in the classes dog"):
        open_data(FolderConfig(kind="folder", path=spoilt, skip_corrupt=True))
