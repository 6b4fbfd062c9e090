"""Run `docs/quickstart.md` in a shell, with a very short training."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.page_commands import Workspace, draw
from tests.docs.reading import ROOT, blocks

PAGE = ROOT / "docs" / "quickstart.md"
CLASSES = {"bars", "checks", "diagonals", "rings", "steps", "waves"}
_, ASK = blocks(PAGE, "python")
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]


def test_the_script_draws_ten_images_of_each_of_six_classes(tmp_path: Path) -> None:
    draw(tmp_path)
    photos = sorted((tmp_path / "photos").glob("*/*.jpg"))
    assert len(photos) == 60
    assert {photo.parent.name for photo in photos} == CLASSES
    assert len({photo.read_bytes() for photo in photos}) == 60
    for photo in photos:
        with Image.open(photo) as image:
            assert (image.size, image.mode) == ((96, 96), "RGB")


def test_the_page_contains_the_whole_workflow_in_order() -> None:
    commands = [line.split()[1] for line in LINES if line.startswith("sopdeploy ")]
    assert commands == ["train", "export", "verify", "predict", "serve"]
    assert {line.split()[0] for line in LINES} == {"git", "pip", "python", "sopdeploy", "curl"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_command_works_as_printed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    lines = {line.split()[1]: line for line in LINES if line.startswith("sopdeploy ")}
    workspace.run(lines["train"])
    assert "bitwise equal" in workspace.run(lines["export"])
    assert workspace.run(lines["verify"])
    assert re.search("|".join(CLASSES), workspace.run(lines["predict"]))
    with workspace.serving(lines["serve"]):
        assert '"probability"' in workspace.run(next(line for line in LINES if line.startswith("curl ")))
        assert re.match("|".join(CLASSES), workspace.run(ASK))
