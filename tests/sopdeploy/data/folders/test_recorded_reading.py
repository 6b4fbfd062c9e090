"""How the images of a run were read is recorded, and other images are read like them."""

from pathlib import Path
from zlib import crc32

import pytest
from pydantic import ValidationError

from sopdeploy.base.project import AS_IT_IS, FolderReading
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.sources import FolderConfig
from sopdeploy.errors import DataError
from tests.support.small_data import jpeg


def make(root: Path, folders: dict[str, int]) -> Path:
    """Make a folder with so many different images in each of *folders*."""
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            content = jpeg(crc32(f"{name} {number}".encode()), (32, 24))
            (root / name / f"{number:03}.jpg").write_bytes(content)
    return root


def make_with_table(root: Path, name: str = "HAM.csv") -> Path:
    """Make a folder with ten images and a table of their classes `a` and `b`, and of their ages."""
    make(root, {"images": 10})
    rows = [f"{number:03},{'ab'[number % 2]},{number}.5" for number in range(10)]
    (root / name).write_text("\n".join(["image_id,dx,age", *rows]))
    return root


# Folders, what the user says of them, and what is recorded
READ = {
    "class folders": (lambda root: make(root, {"a": 5, "b": 5}), {}),
    "a column": (make_with_table, {"classes_from": "HAM.csv:dx"}),
    "without a folder": (lambda root: make(root, {"a": 5, "b": 5, "old 1": 2}), {"leave_out": "old*"}),
    "subfolders": (lambda root: make(root, {"x/a": 5, "y/b": 5}), {"classes_from": "subfolders"}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "said"), READ.values(), ids=READ)
def test_a_reading_is_recorded_and_other_images_are_read_like_it(tmp_path, build, said) -> None:
    split = open_folder(build(tmp_path / "trained"), **said)
    assert split.reading == FolderReading(**said)

    # The same folder, and another one of the same form, but in another order.
    for folder in (tmp_path / "trained", build(tmp_path / "new")):
        images = open_evaluation_images(folder, ("b", "a"), reading=split.reading)
        assert images.class_counts().tolist() == [5, 5]

    # Class folders of the network, and some of its classes without what the reading names.
    for number, folders in enumerate([{"a": 2, "b": 1}, {"x/a": 2}]):
        sorted_ = make(tmp_path / f"sorted{number}", folders)
        images = open_evaluation_images(sorted_, ("a", "b"), reading=split.reading)
        assert images.class_counts().tolist() == [*folders.values(), 0][:2]


def test_a_network_of_several_classes_reads_the_table_of_its_reading(tmp_path) -> None:
    make_with_table(tmp_path)
    reading = FolderReading(classes_from="HAM.csv:dx")
    images = open_evaluation_images(
        tmp_path, ("b", "c", "a"), multi_label=True, reading=reading
    )

    assert images.labels == ("b", "c", "a")
    assert images.class_counts().tolist() == [5, 0, 5]


OUTSIDE = {
    "an absolute folder": {"folder": "/etc"},
    "a folder above": {"folder": "x/../../y"},
    "the folder above": {"folder": ".."},
    "an absolute table": {"classes_from": "/data/labels.csv:dx"},
    "a table above": {"classes_from": "../labels.csv"},
}


@pytest.mark.parametrize("values", OUTSIDE.values(), ids=OUTSIDE)
def test_a_recorded_reading_that_leads_out_of_the_folder_is_refused(values) -> None:
    with pytest.raises(ValidationError, match="leads out"):
        FolderReading.model_validate(values)


@pytest.mark.parametrize("classes_from", ["..", r"^\D+", "tables/a.csv:b/../c"])
def test_a_pattern_is_recorded_and_a_column_is_not_a_path(classes_from) -> None:
    assert FolderReading(classes_from=classes_from).classes_from == classes_from


def test_a_run_does_not_record_a_table_outside_of_its_folder(tmp_path) -> None:
    make_with_table(tmp_path / "photos")
    table = (tmp_path / "photos/HAM.csv").rename(tmp_path / "HAM.csv")

    for name in ("../HAM.csv", str(table)):
        split = open_folder(tmp_path / "photos", classes_from=f"{name}:dx")
        assert split.train.class_counts().tolist() == [5, 5]
        assert split.reading == AS_IT_IS


# How the table is found, by the reading or by its name
TABLES = {
    "of the reading": ("HAM.csv", FolderReading(classes_from="HAM.csv:dx")),
    "by its name": ("labels.csv", AS_IT_IS),
}


@pytest.mark.parametrize(("name", "reading"), TABLES.values(), ids=TABLES)
def test_classes_of_a_table_are_matched_like_those_of_folders(tmp_path, name, reading) -> None:
    make(tmp_path, {"images": 6})
    classes = ["n01440764", "a", "a", "n01440764", "other", "n01440764"]
    rows = [f"{number:03},{label},1" for number, label in enumerate(classes)]
    heading = "image_id,dx,age" if reading.classes_from else "file,classes,age"
    (tmp_path / name).write_text("\n".join([heading, *rows]))
    lines: list[str] = []

    # WordNet IDs, classes without images, and other classes if these are allowed
    images = open_evaluation_images(
        tmp_path, ("tench", "b", "a"), other_classes=True, reading=reading, log=lines.append
    )
    assert images.class_counts().tolist() == [3, 0, 2]
    assert any(line.startswith(f"{tmp_path}: ") and line.endswith(": b") for line in lines)
    assert any(line.startswith(f"{tmp_path / name}: ") and "other" in line for line in lines)

    with pytest.raises(DataError, match=r"other .*class"):
        open_evaluation_images(tmp_path, ("tench", "b", "a"), reading=reading)

    # One class is enough.
    (tmp_path / name).write_text("\n".join([heading, *(f"{row:03},a,1" for row in range(6))]))
    images = open_evaluation_images(tmp_path, ("tench", "a"), reading=reading)
    assert images.class_counts().tolist() == [0, 6]


def test_class_folders_beside_others_stay_classes_whatever_the_names_of_files_say(
    tmp_path,
) -> None:
    make(tmp_path, {"a": 2, "b": 1, "other": 3})
    images = open_evaluation_images(
        tmp_path, ("a", "b"), other_classes=True, reading=FolderReading(classes_from=r"^\d+")
    )

    assert images.class_counts().tolist() == [2, 1]


def test_a_missing_table_is_known_by_its_suffix_in_capitals(tmp_path) -> None:
    make(tmp_path, {"x/a": 2, "x/b": 1})
    reading = FolderReading(classes_from="HAM.CSV")
    images = open_evaluation_images(tmp_path, ("a", "b"), reading=reading)

    assert images.class_counts().tolist() == [2, 1]


def test_what_is_too_long_for_a_name_is_not_a_path(tmp_path) -> None:
    make(tmp_path, {"x/a": 2, "x/b": 1})
    long = "z" * 5000
    reading = FolderReading(folder=long, leave_out=long)
    images = open_evaluation_images(tmp_path, ("a", "b"), reading=reading)

    assert images.class_counts().tolist() == [2, 1]

    make(tmp_path / "flat", {"images": 0})
    for name in ("a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg"):
        (tmp_path / "flat/images" / name).write_bytes(jpeg(crc32(name.encode()), (32, 24)))

    pattern = f"^[a-z]|{long}"
    split = open_folder(tmp_path / "flat", classes_from=pattern)
    images = open_evaluation_images(tmp_path / "flat", ("b", "a"), reading=split.reading)

    assert images.class_counts().tolist() == [2, 2]


def test_the_validation_part_is_not_one_that_the_run_left_out(tmp_path) -> None:
    make(
        tmp_path,
        {"train/a": 3, "train/b": 3, "val/as": 2, "val/b": 2, "test/a": 2, "test/b": 2},
    )
    split = open_folder(tmp_path, leave_out="val")
    images = open_evaluation_images(tmp_path, ("a", "b"), reading=split.reading)

    assert [image.split("/")[0] for image in map(images.identity, range(2))] == ["a", "a"]
    assert images.root == tmp_path / "test"


def test_what_0_3_recorded_and_nothing_reads_is_one_line(tmp_path) -> None:
    root = make(tmp_path, {"a": 2, "b": 1})
    with pytest.raises(ValidationError, match="any more"):
        FolderConfig(kind="folder", path=root, classes_from="files")

    for classes_from in ("files", "annotations.json"):
        reading = FolderReading(classes_from=classes_from)
        images = open_evaluation_images(root, ("a", "b", "c"), reading=reading)
        assert images.class_counts().tolist() == [2, 1, 0]
