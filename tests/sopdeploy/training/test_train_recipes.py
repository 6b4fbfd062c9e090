"""The recipes that a CPU can run keep what they promise."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe

COLOURS = ("red", "green", "blue")


@pytest.mark.parametrize("name", ["digits-plain", "digits-dsop"])
def test_the_demo_reads_more_than_98_of_100_digits(tmp_path, name) -> None:
    result = train(read_recipe(name), tmp_path / "run")
    assert result.best_top1 >= 0.98
    assert result.last_top1 >= 0.98


def draw(number: int) -> Image.Image:
    """Return a picture of class `number % 6`: a disc or a cross in one of three colours."""
    rng = np.random.default_rng(number)
    size = (int(rng.integers(90, 160)), int(rng.integers(90, 160)))
    picture = Image.fromarray(rng.integers(90, 160, (size[1], size[0], 3), dtype=np.uint8))
    pen, colour = ImageDraw.Draw(picture), COLOURS[number % 3]
    x, y, r = (
        int(rng.integers(40, size[0] - 40)),
        int(rng.integers(40, size[1] - 40)),
        int(rng.integers(25, 40)),
    )
    if number % 6 < 3:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        pen.line((x - r, y - r, x + r, y + r), fill=colour, width=12)
        pen.line((x - r, y + r, x + r, y - r), fill=colour, width=12)
    return picture


def test_sixty_photos_in_six_classes_train_without_fuss(tmp_path) -> None:
    for number in range(60):
        folder = tmp_path / "photos" / f"class {number % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        draw(number).save(folder / f"{number}.jpg")
    recipe = read_recipe("photos-dsop", [f"data.path={tmp_path / 'photos'}", "epochs=3"])
    result = train(recipe, tmp_path / "run")
    assert (result.train_count, result.held_out_count, result.classes) == (48, 12, 6)
    assert result.best_top1 >= 1 / 6
