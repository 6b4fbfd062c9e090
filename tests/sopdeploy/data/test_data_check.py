"""`sopdeploy data check`."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.data.check import check_data
from sopdeploy.errors import DataError
from tests.sopdeploy.data.small_data import jpeg, write_classes, write_photos


@pytest.fixture
def photos(tmp_path):
    """Write photos with a copy in val/, duplicate pixels in another class, and unusual images."""
    root = write_photos(tmp_path / "photos")
    (root / "val" / "cat" / "copy.jpg").write_bytes((root / "train" / "cat" / "0.jpg").read_bytes())
    Image.open(root / "train" / "cat" / "1.jpg").save(root / "train" / "dog" / "same.png")
    Image.new("RGB", (200, 20)).save(root / "train" / "dog" / "thin.png")
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(root / "train" / "dog" / "deep.png")
    frames = [Image.fromarray(np.full((40, 40), shade, dtype=np.uint8)) for shade in (9, 99)]
    frames[0].save(root / "train" / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    return root


def test_parts_formats_sizes_duplicates_and_unusual_images_are_reported(photos) -> None:
    found = check_data(photos)
    assert {part.name: part.classes for part in found.parts} == {
        "train": {"cat": 4, "dog": 8},
        "val": {"cat": 3, "dog": 2},
    }
    assert found.parts[0].bytes == sum(file.stat().st_size for file in (photos / "train").rglob("*.*"))
    assert found.formats == {"JPEG": 13, "PNG": 3, "GIF": 1}
    assert found.shorter_side == (20, 32, 64)
    assert found.longer_side == (40, 40, 200)
    copied, same = found.duplicates
    assert (copied.across, copied.labels_differ) == (True, False)
    assert (same.across, same.labels_differ) == (False, True)
    assert [file.rpartition("photos/")[2] for file in same.files] == ["train/cat/1.jpg", "train/dog/same.png"]
    assert {why: [file.rpartition("/")[2] for file in files] for why, files in found.strange.items()} == {
        "one color only": ["moving.gif", "thin.png"],
        "shorter side under 32 pixels": ["thin.png"],
        "longer side over 4 times the shorter one": ["thin.png"],
    }
    found.must_be_usable()


def test_every_unreadable_file_and_every_class_of_one_image_is_named(photos, tmp_path, monkeypatch) -> None:
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    (photos / "val" / "dog" / "1.jpg").write_bytes(jpeg(3)[:-200])
    found = check_data(photos)
    assert len(found.unreadable) == 2
    with pytest.raises(
        DataError, match=r"cat/2\.jpg: this is not an.*val/dog/1\.jpg: the image is truncated"
    ):
        found.must_be_usable()
    with pytest.raises(DataError, match=r"a: only one image; add another.*b: only one image"):
        check_data(write_classes(tmp_path / "single", ("a", "b"), 1)).must_be_usable()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"b/0\.jpg: the image has more than 70000000 pixels, the limit; "):
        check_data(tmp_path / "single").must_be_usable()


def test_empty_and_mismatched_class_folders_are_listed_with_all_other_findings(photos) -> None:
    (photos / "train" / "cow").mkdir()
    (photos / "train" / "eel").mkdir()
    (photos / "train" / "eel" / "notes.doc").write_bytes(b"text")
    (photos / "val" / "fox").mkdir()
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    found = CliRunner().invoke(app, ["data", "check", str(photos)])
    assert found.exit_code == 2
    for finding in (
        "train/cow: no images in this class folder (also in eel); add some",
        "val: classes fox are not training classes, remove them or train on them",
        "val: training classes cow, eel are missing, add them",
        "val/fox: no images in this class folder; add some",
    ):
        assert finding in found.stdout
        assert finding in found.stderr
    assert "train/cat/2.jpg: this is not an image" in found.stderr
    assert "1 in both training and held-out data" in found.stdout
    assert check_data(photos).parts[0].classes == {"cat": 4, "cow": 0, "dog": 8, "eel": 0}


def test_the_command_prints_tables_or_json_and_exits_with_2_if_unusable(photos, tmp_path) -> None:
    found = CliRunner().invoke(app, ["data", "check", str(photos)])
    assert (found.exit_code, found.stderr) == (0, "")
    assert "1 in both training and held-out data, 1 in different classes" in found.stdout
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    found = CliRunner().invoke(app, ["data", "check", str(photos), "--json"])
    assert found.exit_code == 2
    assert len(json.loads(found.stdout)["unreadable"]) == 1
    assert found.stderr.startswith(f"error: {photos}: cannot be used as it is: ")
    assert found.stderr.count("\n") == 1
    found = CliRunner().invoke(app, ["data", "check", str(tmp_path / "nowhere")])
    assert (found.exit_code, found.stdout) == (2, "")
    assert "nowhere: no such folder" in found.stderr
