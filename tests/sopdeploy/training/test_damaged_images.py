"""Damaged images are left out of a run, unless they are too many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sopdeploy.data.folders.check import check_data
from sopdeploy.data.photos.file_checks import leave_out_unreadable
from sopdeploy.data.photos.photo import ArrayImages, Split, image_errors
from sopdeploy.errors import DataError, ImageError, amount
from sopdeploy.training.callback import Callback
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.setup import Setup, set_up_run
from sopdeploy.training.train import train_recipe
from tests.support.small_data import jpeg, write_photos

MODEL = ["model.name=dsop-resnet8", "model.config={aux_widths=[8,8,8], iterations=2}"]
SMALL = [*MODEL, "preprocess.resize=20", "preprocess.crop=16", "batch_size=3", "epochs=2"]


def recipe_for(path: Path):
    return read_recipe("photos-dsop", [*SMALL, f"data.path={path}"])


def damage(root: Path, *names: str) -> Path:
    """Write photos of which the files *names* end too early."""
    write_photos(root)
    for name in names:
        (root / name).write_bytes(jpeg(1)[:-300])
    return root


class Warnings(Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_warning(self, warning: str) -> None:
        self.lines.append(warning)


@pytest.mark.parametrize(
    "names", [("train/dog/2.jpg",), ("train/dog/2.jpg", "val/dog/0.jpg")], ids=len
)
def test_damaged_images_are_left_out_named_and_counted(tmp_path, names) -> None:
    root, heard = damage(tmp_path / "photos", *names), Warnings()
    result = train_recipe(recipe_for(root), tmp_path / "run", callback=heard)
    num_train, num_held_out = 7, 5 - len(names)
    assert (result.train_count, result.held_out_count) == (num_train, num_held_out)

    # A warning names them with their folder, and a line of the report without it.
    (warning,) = [line for line in heard.lines if "unusable" in line]
    (line,) = [line for line in result.procedure.lines() if "unusable" in line]
    left_out = f"{amount(len(names), 'unusable image')} left out: "
    reason = "the image is truncated; repair, convert or delete it"
    for text, places in (
        (warning, [str(root / name) for name in names]),
        (line, ["dog/2.jpg"]),
    ):
        assert all(place in text for place in places)
        of_one = f"{left_out}{places[0]}: {reason}"
        of_several = f"{left_out}{reason}: "  # then the names
        assert text == of_one or text.startswith(of_several)

    # `sopdeploy check` refuses what a run leaves out.
    with pytest.raises(DataError, match="truncated"):
        check_data(root).must_be_usable()

    # A resumed run leaves the same images out, also if they are repaired.
    (root / names[0]).write_bytes(jpeg(1))
    resumed = train_recipe(recipe_for(root), tmp_path / "run", resume=True)
    assert (resumed.train_count, resumed.best_top1) == (num_train, result.best_top1)
    assert resumed.procedure == result.procedure


@pytest.mark.parametrize(
    ("code", "has_more_advice"),
    [("unsupported_format", False), ("damaged_image", True)],
)
def test_an_image_of_an_unsupported_format_has_its_cure_alone(
    code: str, has_more_advice: bool
) -> None:
    with pytest.raises(DataError) as caught, image_errors("a.heic"):
        raise ImageError("run pip", code=code)
    assert str(caught.value).startswith("a.heic: run pip")
    assert (str(caught.value) != "a.heic: run pip") is has_more_advice


def test_a_file_that_vanishes_during_a_run_is_left_out_and_named(tmp_path, monkeypatch) -> None:
    root, heard = damage(tmp_path / "photos"), Warnings()
    gone = root / "train/dog/2.jpg"

    def set_up_and_delete(*arguments: Any) -> Setup:
        setup = set_up_run(*arguments)
        gone.unlink(missing_ok=True)
        return setup

    monkeypatch.setattr("sopdeploy.training.train.set_up_run", set_up_and_delete)
    result = train_recipe(recipe_for(root), tmp_path / "run", callback=heard)
    assert (result.train_count, result.held_out_count) == (7, 4)
    assert any(f"{gone}: " in line for line in heard.lines)


TOO_DAMAGED = {
    "a class without images": [f"train/dog/{number}.jpg" for number in range(4)],
    "no held-out images": [
        f"val/{label}/{number}.jpg" for label in ("cat", "dog") for number in range(2)
    ],
    "three, more than a twentieth": ["train/cat/1.jpg", "train/dog/2.jpg", "val/dog/0.jpg"],
}


@pytest.mark.parametrize("names", TOO_DAMAGED.values(), ids=TOO_DAMAGED)
def test_too_many_damaged_images_end_a_run(tmp_path, names) -> None:
    root = damage(tmp_path / "photos", *names)
    with pytest.raises(DataError, match=f"^{len(names)} images"):
        train_recipe(recipe_for(root), tmp_path / "run")


class Damaged(ArrayImages):
    """Images of which the first `count` are damaged."""

    count = 0

    def read(self, index: int) -> bytes:
        return b"no image" if index < self.count else super().read(index)


@pytest.mark.parametrize(("count", "ends"), [(2, False), (3, False), (4, True)])
def test_a_run_ends_from_a_twentieth_of_the_images_on(count, ends) -> None:
    images = Damaged(("cat", "dog"), np.zeros((60, 2, 2), np.uint8), np.arange(60) % 2)
    Damaged.count, first = count, DataError("0: damaged")
    if ends:
        with pytest.raises(DataError, match="4 images"):
            leave_out_unreadable(Split.undivided(images), first)
    else:
        remaining = leave_out_unreadable(Split.undivided(images), first)
        assert (len(remaining.train), len(remaining.left_out)) == (60 - count, count)
