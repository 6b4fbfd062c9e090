"""`docs/quickstart.md` is typed as it stands, by a shell; only training is made tiny."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.reading import ROOT, blocks
from tests.docs.typed import Home, draw

PAGE = ROOT / "docs" / "quickstart.md"
CLASSES = {"bars", "checks", "diagonals", "rings", "steps", "waves"}
_, ASK = blocks(PAGE, "python")
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]


def test_the_script_draws_ten_pictures_of_each_of_six_classes(tmp_path: Path) -> None:
    draw(tmp_path)
    photos = sorted((tmp_path / "photos").glob("*/*.jpg"))
    assert len(photos) == 60
    assert {photo.parent.name for photo in photos} == CLASSES
    assert len({photo.read_bytes() for photo in photos}) == 60
    for photo in photos:
        with Image.open(photo) as picture:
            assert (picture.size, picture.mode) == ((96, 96), "RGB")


def test_the_page_goes_the_whole_way_in_order() -> None:
    verbs = [line.split()[1] for line in LINES if line.startswith("sopdeploy ")]
    assert verbs == ["train", "export", "verify", "predict", "serve", "doctor"]
    assert {line.split()[0] for line in LINES} == {"pip", "python", "sopdeploy", "curl"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_command_works_as_printed(tmp_path: Path) -> None:
    home = Home(tmp_path)
    lines = {line.split()[1]: line for line in LINES if line.startswith("sopdeploy ")}
    home.typed(lines["train"])
    assert "bitwise equal" in home.typed(lines["export"])
    assert home.typed(lines["verify"])
    assert re.search("|".join(CLASSES), home.typed(lines["predict"]))
    with home.serving(lines["serve"]):
        assert '"probability"' in home.typed(next(line for line in LINES if line.startswith("curl ")))
        assert re.match("|".join(CLASSES), home.typed(ASK))
        assert "request" in home.typed(lines["doctor"])
