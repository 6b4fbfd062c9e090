"""What people's folders look like: names of parts, junk, nested classes, missing classes, long lists."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.data.base import Split
from sopdeploy.data.check import check_data
from sopdeploy.data.datasets.folder import class_aliases, open_evaluation_images, open_folder
from sopdeploy.errors import DataError
from tests.sopdeploy.data.small_data import write_classes
from tests.sopdeploy.data.test_data_folder import make

PETS = {"cats": 3, "dogs": 3}


def below(*parts: str) -> dict[str, int]:
    """So many images of every pet, below each of the folders *parts*."""
    return {f"{part.replace('/', '__')}__{name}": count for part in parts for name, count in PETS.items()}


def open_logged(path: Path) -> tuple[Split, str]:
    lines: list[str] = []
    split = open_folder(path, lines.append)
    return split, "\n".join(lines)


LAYOUTS = [
    below("Training", "Validation"),
    below("Train", "Val"),
    below("seg_train/seg_train", "seg_test/seg_test"),
    below("train-images", "dev"),
    below("trainset", "testset"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_usual_names_of_parts_are_recognized_in_any_case(tmp_path, layout) -> None:
    path = make(tmp_path / "photos", **layout)
    split, log = open_logged(path)
    assert (split.train.labels, len(split.train), len(split.held_out)) == (("cats", "dogs"), 6, 6)
    assert log == ""
    assert [part.count for part in check_data(path).parts] == [6, 6]
    used: list[str] = []
    assert len(open_evaluation_images(path, ("cats", "dogs"), log=used.append)) == 6
    assert used[0].endswith(": the images in this folder are used")


UNCLEAR = [
    (
        below("train", "val", "test") | {"extra__new": 2},
        (6, 6),
        "training uses train and val only, not test, extra",
    ),
    (PETS | {"test": 3}, (9, 0), "test counts as a class, because there is no folder train"),
    ({"train": 3, "car": 3}, (6, 0), ""),
    (below("train"), (6, 0), ""),
    (
        {"animals__cats": 3, "animals__dogs": 2, "plants": 3},
        (8, 0),
        "of several folders as one group: animals/cats, animals/dogs; move these folders up if they are",
    ),
]


@pytest.mark.parametrize(("counts", "sizes", "line"), UNCLEAR, ids=[line[:20] for *_, line in UNCLEAR])
def test_folders_that_may_be_a_mistake_are_named(tmp_path, counts, sizes, line) -> None:
    split, log = open_logged(make(tmp_path, **counts))
    assert (len(split.train), len(split.held_out)) == sizes
    assert line in log
    assert log.count("\n") == 0
    assert "\n".join(check_data(tmp_path).notes) == log


def test_two_folders_of_training_images_are_an_error(tmp_path) -> None:
    with pytest.raises(DataError, match="Training, train may all hold the training images; rename all but"):
        open_logged(make(tmp_path, **below("train", "Training", "val")))


def test_folders_of_file_systems_and_programs_are_no_classes(tmp_path) -> None:
    make(tmp_path / "photos", **PETS)
    for junk in ("__MACOSX", "@eaDir", "lost+found", "cats/@eaDir", ".thumbnails"):
        make(tmp_path / "photos" / junk, inside=2)
    split, _ = open_logged(tmp_path / "photos")
    assert (split.train.labels, len(split.train) + len(split.held_out)) == (("cats", "dogs"), 6)


@pytest.mark.parametrize(
    ("classes", "shape"),
    [(["cat", "dog", "cat", "dog"], (3,)), (["cat", "dog", "cat|dog", "dog"], (3, 2))],
    ids=["one class each", "several classes"],
)
def test_a_table_with_one_class_per_image_makes_a_network_that_predicts_one(tmp_path, classes, shape) -> None:
    make(tmp_path, images=4)
    lines = [f"images/{number:03}.jpg,{name}" for number, name in enumerate(classes)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,classes", *lines]))
    split, log = open_logged(tmp_path)
    assert (split.train.labels, split.train.targets.ndim) == (("cat", "dog"), len(shape))
    assert ("every image has one class, so the network predicts one" in log) == (len(shape) == 1)
    if len(shape) == 1:
        found = open_evaluation_images(tmp_path, ("dog", "cat"))
        assert [found.labels[target] for target in found.targets] == classes
        assert check_data(tmp_path).parts[0].classes == {"cat": 2, "dog": 2}


def test_forty_broken_files_are_ten_and_a_number(tmp_path) -> None:
    folder = write_classes(tmp_path / "photos", ("a", "b"), 30)
    for file in sorted(folder.rglob("*.jpg"))[:40]:
        file.write_bytes(b"no image")
    command = ["train", "--recipe", "digits-plain", "--set", "data.kind=folder", "--data", str(folder)]
    shown = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run"), "--json"])
    assert shown.exit_code == 2
    assert "40 images cannot be used" in shown.stderr
    assert shown.stderr.count("not an image") == 10
    assert " and 30 more" in shown.stderr
    assert len(json.loads(shown.stdout)["error"]["lists"]["images"]) == 40
    checked = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert checked.stderr.count("not an image") == 10
    assert "and 30 more" in checked.stderr


def test_folders_named_by_wordnet_ids_match_and_absent_classes_are_named(tmp_path) -> None:
    folder = write_classes(tmp_path / "photos", ("n01443537", "n01440764", "great white shark"), 2)
    labels, lines = tuple(class_aliases()[f"n0{number}"] for number in (1440764, 1443537, 1484850)), []
    images = open_evaluation_images(folder, (*labels, "hen"), log=lines.append)
    assert images.class_counts().tolist() == [2, 2, 2, 0]
    assert lines == [f"{folder}: no images of 1 of 4 classes: hen"]
