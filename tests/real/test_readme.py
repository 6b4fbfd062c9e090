"""The commands of the README, typed twice in a row with real photographs, more of them the second time."""

import re
import shutil
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.checkpoint import read_checkpoint
from tests.docs.page_commands import Workspace
from tests.docs.reading import ROOT, blocks
from tests.real.conftest import LITE0

LINES = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
ROUNDS = {1: 5, 2: 8}  # photographs per class

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]


def command(start: str) -> str:
    """Return the first line of the README that begins with *start*."""
    return next(line for line in LINES if line.startswith(start))


def test_a_second_round_with_more_photographs_works_like_the_first(
    photos: Path, lite0_file: Path, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    shutil.rmtree(tmp_path / "photos")
    own = f"train --weights {lite0_file} --set model.name={LITE0} --data"
    found = []
    for number, count in ROUNDS.items():
        for folder in filter(Path.is_dir, photos.iterdir()):
            (tmp_path / "photos" / folder.name).mkdir(parents=True, exist_ok=True)
            for photo in sorted(folder.glob("*.jpg"))[:count]:
                shutil.copy(photo, tmp_path / "photos" / folder.name)
        shutil.copy(next((tmp_path / "photos" / "hat").glob("*.jpg")), tmp_path / "photo.jpg")
        trained = workspace.run(command("sopdeploy train").replace("train --data", own))
        assert re.search(rf"95 % interval \d+ to \d+ %.* of {4 * count} images", trained)
        assert f"next: sopdeploy export runs/photos-{number}/best.pt" in trained
        exported = workspace.run(command("sopdeploy export"))
        assert "removed  nothing: the network has no training-only parts" in exported
        assert "tf_efficientnet_lite0-" in workspace.run(command("sopdeploy verify"))
        assert "photo.jpg: hat " in workspace.run(command("sopdeploy predict"))
        with workspace.serving(command("sopdeploy serve")):
            assert '{"classes":[{"label":"hat"' in workspace.run(command("curl"))
        checkpoint = read_checkpoint(tmp_path / "runs" / "latest" / "best.pt")
        bundle = open_bundle(tmp_path / "bundles" / "latest")
        assert bundle.manifest.lineage.checkpoint_sha256 == checkpoint.sha256
        assert checkpoint.training["few_shot"]["top1"]["count"] == 4 * count
        found.append(bundle)
    with workspace.serving(
        command("sopdeploy serve").replace("bundles/latest", "bundles")
    ):  # as the container
        assert found[-1].manifest.id in workspace.run("curl http://127.0.0.1:8000/info")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"latest", "photos-1", "photos-2"}
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {
        "latest",
        *(one.name for one in found),
    }
    assert len(found) == len({one.name for one in found}) == 2
