"""The commands of the README, typed in three rounds with real photographs and other classes each time."""

import json
import re
import shutil
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.checkpoint import read_checkpoint
from tests.docs.page_commands import Workspace
from tests.docs.reading import ROOT, blocks

LINES = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
FIRST = {
    "hat": "hat",
    "shoes": "shoes",
    "dress": "dress",
}  # folders of the photographs, names of the classes
RENAMED = {**FIRST, "dress": "evening dress"}
ROUNDS = {
    1: (5, FIRST),
    2: (6, RENAMED),
    3: (8, {**RENAMED, "pants": "pants"}),
}  # photographs per class

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]


def command(start: str) -> str:
    """Return the first line of the README that begins with *start*."""
    return next(line for line in LINES if line.startswith(start))


def container_command(folder: str) -> str:
    """Return the command that the container executes, for *folder*, reachable from this machine only."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    starts = ("ENTRYPOINT ", "CMD ")
    entry, typed = (
        next(line for line in lines if line.strip().startswith(start)) for start in starts
    )
    words = [json.loads(line.partition(" ")[2]) for line in (entry, typed)]
    return (
        " ".join([*words[0], *words[1]])
        .replace("/models", folder)
        .replace("--host 0.0.0.0", "--host 127.0.0.1")
    )


def test_three_rounds_with_other_classes_work_and_the_container_serves_the_last(
    photos: Path, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    shutil.rmtree(tmp_path / "photos")
    found: list[Bundle] = []
    for number, (count, classes) in ROUNDS.items():
        for source, name in classes.items():
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            for photo in sorted((photos / source).glob("*.jpg"))[:count]:
                shutil.copy(photo, tmp_path / "photos" / name)
        for folder in {path.name for path in (tmp_path / "photos").iterdir()} - {
            *classes.values()
        }:
            shutil.rmtree(tmp_path / "photos" / folder)  # the class was renamed
        shutil.copy(next((tmp_path / "photos" / "hat").glob("*.jpg")), tmp_path / "photo.jpg")
        images = len(classes) * count
        trained = workspace.run(command("sopdeploy train"))  # without a hub
        assert re.search(rf"95 % interval \d+ to \d+ %.* of {images} images", trained)
        assert f"next: sopdeploy export runs/photos-{number}/best.pt --detach" in trained
        exported = workspace.run(command("sopdeploy export"))
        assert "removed  nothing: this network has no auxiliary branches" in exported
        assert "verified photos-" in workspace.run(command("sopdeploy verify"))
        assert "photo.jpg: hat " in workspace.run(command("sopdeploy predict"))
        with workspace.serving(command("sopdeploy serve")):
            assert '{"classes":[{"label":"hat"' in workspace.run(command("curl"))
        checkpoint = read_checkpoint(tmp_path / "runs" / "latest" / "best.pt")
        bundle = open_bundle(tmp_path / "bundles" / "latest")
        assert bundle.manifest.lineage.checkpoint_sha256 == checkpoint.sha256
        assert checkpoint.training["procedure"]["top1"]["count"] == images
        assert set(bundle.labels) == {*classes.values()}
        assert bundle.manifest.origin is not None
        assert bundle.manifest.origin.run == f"photos-{number}"
        found.append(bundle)
    names = [bundle.name for bundle in found]
    assert len(set(names)) == len(ROUNDS)
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {"latest", *names}
    rows = json.loads(workspace.run("sopdeploy runs --json"))
    assert [(row["run"], row["bundle"], row["newest"]) for row in rows] == [
        (f"photos-{number}", names[number - 1], number == len(ROUNDS))
        for number in reversed(ROUNDS)
    ]
    shutil.copytree(
        tmp_path / "bundles", tmp_path / "copied"
    )  # like `cp -rL`: `latest` becomes a folder
    for folder in ("bundles", "copied"):
        with workspace.serving(container_command(folder)):
            (model,) = json.loads(workspace.run("curl http://127.0.0.1:8000/info"))["models"]
            assert (model["name"], model["bundle"]) == ("photos", names[-1])
            assert '{"classes":[{"label":"hat"' in workspace.run(command("curl"))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "latest",
        *(f"photos-{number}" for number in ROUNDS),
    }
