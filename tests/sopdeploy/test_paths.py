"""What is at a path that a user gave, and what each command says where something else is wanted."""

import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from sopdeploy.base.files import GRAPH, LATEST, MANIFEST, POINTER, POINTER_ADVICE, read_text
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import BundleError, SopdeployError
from sopdeploy.paths import (
    CHECKPOINT_FORMAT,
    PathKind,
    Wanted,
    describe_near,
    describe_wrong,
    what_is,
)
from sopdeploy.weights.files import check_is_checkpoint, check_is_weights

KINDS: dict[str, PathKind] = {
    "nowhere": "nothing",
    "net.py:Net": "code",
    "bundles/tiny-1/golden-0.jpg": "bundle_file",
    "runs/tiny-1/best.pt": "checkpoint",
    "weights.pt": "weights",
    "bundle.tar": "archive",
    "photos.zip": "archive",
    "net.onnx": "foreign",
    "hat.jpg": "photograph",
    "notes.txt": "file",
    "fetched.onnx": "pointer",
    "fetched.pt": "pointer",
    "bundles/tiny-1": "bundle",
    "runs/tiny-1": "run",
    "runs/tiny-2": "run",
    "photos": "photographs",
    "photos/hat": "photographs",
    "bundles": "bundles",
    "runs": "runs",
    "damaged": "folder",
    "empty": "folder",
    ".": "photographs",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a path of each kind, under the names of `KINDS`."""
    place = tmp_path_factory.mktemp("place")
    files = {
        f"bundles/tiny-1/{MANIFEST}": b"{}",
        "bundles/tiny-1/golden-0.jpg": b"",
        "bundles/tiny-2/golden-0.jpg": b"",
        f"bundles/tiny-2/{MANIFEST}": b"{}",
        "runs/tiny-2/last.pt": b"",
        "net.onnx": b"\x08",
        "hat.jpg": b"",
        "notes.txt": b"hello",
        "fetched.onnx": POINTER,
        "fetched.pt": POINTER,
        "photos.zip": b"",
        "photos/hat/1.jpg": b"",
        f"photos/tiny-3/{MANIFEST}": b"{}",  # a bundle among photographs
        f"damaged/{GRAPH}": b"\x08",  # a bundle without its manifest
        "damaged/golden-0.jpg": b"",
    }

    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (place / "empty").mkdir()
    with tarfile.open(place / "bundle.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(MANIFEST))
    (place / "bundles" / LATEST).symlink_to("tiny-2")

    (place / "runs" / "tiny-1").mkdir()
    pickled = {"runs/tiny-1/best.pt": CHECKPOINT_FORMAT.encode(), "weights.pt": b"}"}
    for name, content in pickled.items():
        with zipfile.ZipFile(place / name, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    return place


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_path_is_found(name: str, place: Path) -> None:
    assert what_is(place / name) == KINDS[name]


# What is there instead of what is wanted, and the path or command that helps
ADVICE: dict[tuple[Wanted, str], str] = {
    ("bundle", "bundles"): "folder of bundles.* bundles/latest",
    ("bundle", "bundles/tiny-1/golden-0.jpg"): "file of a bundle.* bundles/tiny-1",
    ("bundle", "runs/tiny-2"): "run.* export runs/tiny-2/last.pt --detach",
    ("bundle", "runs"): "folder of runs.* export runs/tiny-1/best.pt --detach",
    ("bundle", "weights.pt"): "weights.* export weights.pt --network",
    ("bundle", "bundle.tar"): "archive",
    ("bundle", "photos.zip"): "archive",
    ("bundle", "hat.jpg"): "photo",
    ("bundle", "notes.txt"): "not a folder",
    ("bundle", "empty"): r"no manifest\.json",
    ("checkpoint", "bundles/tiny-1"): "bundle.* serve bundles/tiny-1",
    ("checkpoint", "runs"): "folder of runs.* runs/tiny-1/best.pt",
    ("checkpoint", "photos"): "photos.* train --data photos",
    ("checkpoint", "notes.txt"): "not a checkpoint",
    ("checkpoint", "nowhere"): "no such file",
    ("run", "runs"): "folder of runs.* runs/tiny-1",
    ("run", "bundles/tiny-1"): "bundle.* runs/index.html",
    ("run", "runs/tiny-1/best.pt"): "a checkpoint",
    ("run", "empty"): "a folder",
    ("weights", "runs/tiny-1"): "run.* runs/tiny-1/best.pt",
    ("weights", "empty"): "a folder",
    ("photographs", "bundles/tiny-1"): "a bundle",
    ("photographs", "photos.zip"): "archive.* unpack",
    ("bundle", "fetched.onnx"): "git lfs pull",
    ("checkpoint", "fetched.pt"): "git lfs pull",
    ("photographs", "notes.txt"): "not a folder",
    ("photographs", "nowhere"): "no such folder",
}


@pytest.mark.parametrize(("wanted", "name"), ADVICE)
def test_what_is_not_wanted_is_named_with_what_to_do(
    wanted: Wanted, name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    said = describe_wrong(Path(name), wanted)

    assert re.search(ADVICE[wanted, name], said)
    assert "\n" not in said


@pytest.mark.parametrize("name", ["fetched.pt", "fetched.onnx", "fetched.safetensors"])
def test_a_pointer_of_git_lfs_is_not_a_damaged_file(name: str, place: Path) -> None:
    path = place / name
    path.write_bytes(POINTER + b"v1\n")

    for check in (check_is_weights, check_is_checkpoint):
        with pytest.raises(SopdeployError) as caught:
            check(path)
        assert str(caught.value) == f"{path}: {POINTER_ADVICE}"
    with pytest.raises(OSError, match="git lfs pull"):
        read_text(path)


def test_a_bundle_of_pointers_is_not_a_damaged_bundle(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(POINTER)

    with pytest.raises(BundleError, match="git lfs pull"):
        open_bundle(tmp_path)


# A missing path, and the path that is meant; "" if none is
NEAR = {
    "photo": "photos?",
    "runs/photos-3": "runs/photos-1?",
    "runs/photos-3/best.pt": "runs/photos-1/best.pt?",
    "runs/photos-3/last.pt": "",
    "runs/latest/best.pt": "runs/photos-3, which",
    "runs/latest": "runs/photos-3, which",
    "elsewhere/photos-1": "",
    "https:/x.org/photos": "address",
}


@pytest.mark.parametrize("missing", NEAR)
def test_what_lies_beside_a_missing_path_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "runs/photos-1"):
        Path(folder).mkdir(parents=True)
    Path("runs/photos-1/best.pt").touch()
    Path("runs/latest").symlink_to("photos-3")

    said = describe_near(Path(missing))
    assert NEAR[missing] in said
    assert bool(said) == bool(NEAR[missing])
