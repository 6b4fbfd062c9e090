"""Readings: what may be read in several ways is asked, with commands that train what they say."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sopdeploy.data.sources import FolderConfig, open_data
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.photos import cells, forms
from sopdeploy.photos.evaluation_images import open_evaluation_images
from sopdeploy.photos.files import FILES
from sopdeploy.photos.folder import open_folder
from sopdeploy.photos.readings import Reading
from sopdeploy.project import AS_IT_IS, FolderReading
from sopdeploy_commands.training.data import check
from tests.support.golden import check_golden
from tests.support.small_data import jpeg


def make(root: Path, folders: dict[str, int]) -> Path:
    """Make a folder with so many different images in each of *folders*."""
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            content = jpeg(crc32(f"{name} {number}".encode()), (32, 24))
            (root / name / f"{number:03}.jpg").write_bytes(content)
    return root


def check_command(command: str) -> dict[str, int]:
    """Run `data check` with the settings of a printed command; return the counts of the first part."""
    _, _, _, path, *settings = shlex.split(command)
    report = check(Path(path), set=tuple(settings[1::2]))
    return report.parts[0].classes


def open_command(command: str):
    """Open the data of a printed command as `train` does."""
    program, name, option, path, *settings = shlex.split(command)
    assert [program, name, option] == ["sopdeploy", "train", "--data"]
    values = dict(
        setting.removeprefix("data.").split("=", 1)
        for setting in settings
        if setting != "--set"
    )
    return open_data(FolderConfig(kind="folder", path=Path(path), **values))


# The folders with their numbers of images, and a reading with its classes
ASKED: dict[str, tuple[dict[str, int], str, list[str]]] = {
    "other photos beside": ({"raw/mtb": 6, "raw/road": 6, "bikes_test": 6}, "raw", ["mtb", "road"]),
    "samples beside": ({"photos_of/a": 6, "photos_of/b": 6, "samples": 3}, "photos_of", ["a", "b"]),
    "unlabelled beside": ({"labelled/a": 6, "labelled/b": 6, "unlabelled": 6}, "labelled", ["a", "b"]),
    "a backup inside": ({"a": 6, "b": 6, "backup/a": 6, "backup/b": 6}, "leave_out=backup", ["a", "b"]),
    "a folder of one image": ({"real/a": 6, "real/b": 6, "results": 3, "app": 1}, "real", ["a", "b"]),
    "two levels": (
        {"apple/scab": 6, "apple/rot": 6, "corn/rust": 6, "corn/blight": 6},
        "subfolders",
        ["blight", "rot", "rust", "scab"],
    ),
    "unsorted": ({"a": 6, "b": 6, "unsorted": 6}, "leave_out=unsorted", ["a", "b"]),
    "unknown": ({"a": 6, "b": 6, "unknown": 6}, "leave_out=unknown", ["a", "b"]),
    "days": (
        {"2024-05-01": 6, "2024-05-02": 6}, "classes_from=folders", ["2024-05-01", "2024-05-02"]
    ),
    "a new folder": ({"a": 6, "b": 6, "New folder": 6}, "leave_out='New folder'", ["a", "b"]),
    "a copy by its number": ({"a": 6, "b": 6, "b (2)": 6}, "leave_out='b (2)'", ["a", "b"]),
    "to sort": ({"a": 6, "b": 6, "to_sort": 6}, "leave_out=to_sort", ["a", "b"]),
    "a new folder in German": ({"a": 6, "b": 6, "Neuer Ordner": 6}, "leave_out='Neuer Ordner'", ["a", "b"]),
    "a copy by its name": ({"a": 6, "b": 6, "b - Copy": 6}, "leave_out='b - Copy'", ["a", "b"]),
    "results": ({"cats": 6, "dogs": 6, "results": 3}, "leave_out=results", ["cats", "dogs"]),
    "pages": ({"cat": 6, "dog": 6, "docs": 6}, "leave_out=docs", ["cat", "dog"]),
    "a page": ({"cat": 6, "dog": 6, "doc": 6}, "leave_out=doc", ["cat", "dog"]),
    "pictures of a program": ({"cat": 6, "dog": 6, "assets": 6}, "leave_out=assets", ["cat", "dog"]),
    "pictures of a report": ({"cat": 6, "dog": 6, "figures": 6}, "leave_out=figures", ["cat", "dog"]),
    "pictures of a server": ({"cat": 6, "dog": 6, "static": 6}, "leave_out=static", ["cat", "dog"]),
    "predictions": ({"yes": 6, "no": 6, "pred": 3}, "leave_out=pred", ["no", "yes"]),
    "a folder named as a format": ({"jpg": 6, "segmim": 6}, "folders", ["jpg", "segmim"]),
    "classes called by digits": (
        {**{f"Dataset/{digit}": 3 for digit in range(3)}, "Examples": 3}, "Dataset", ["0", "1", "2"]
    ),
    "exercises beside others": (
        {"lab1": 6, "lab2": 6, "lab5": 6, "notes": 6, "slides": 6},
        "leave_out=lab1,lab2,lab5",
        ["notes", "slides"],
    ),
    "exercises of two courses in one folder": (
        {"images/lab1": 9, "images/lab4": 9, "images/mod8": 9, "images/mod10": 9, "images/end": 9},
        "images --set data.classes_from=folders",
        ["end", "lab1", "lab4", "mod10", "mod8"],
    ),
    "numbered classes of a training folder": (
        {"train_shapes/shape_0": 9, "train_shapes/shape_1": 9, "plots": 2},
        "train_shapes",
        ["shape_0", "shape_1"],
    ),
    "a name with a comma": (
        {"a": 6, "b": 6, "old, results": 6}, "leave_out='old, results'", ["a", "b"]
    ),
    "a name that is a number": ({"7": 6, "8": 6, "results": 6}, "leave_out=results", ["7", "8"]),
    "training images or a class": (
        {"train/a": 6, "train/b": 6, "figures": 3}, "classes_from=folders", ["figures", "train"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("folders", "option", "labels"), ASKED.values(), ids=ASKED)
def test_a_folder_with_several_readings_is_asked_about_with_commands_that_train_them(
    tmp_path, folders, option, labels
) -> None:
    root = make(tmp_path / "x", folders)
    with pytest.raises(DataError, match=r"run") as caught:
        open_folder(root)

    # Each command trains the classes and counts that are printed behind it.
    opened = {command: open_command(command) for command in caught.value.lists["readings"]}
    for command, split in opened.items():
        counts = zip(split.train.labels, split.train.class_counts().tolist(), strict=True)
        shown = ", ".join(f"{label} {count}" for label, count in counts)
        assert f"{command} ({shown}" in str(caught.value)
        checked = check_command(command)  # which also has the classes of one image
        assert [label for label in checked if checked[label] > 1] == [*split.train.labels]
    (meant,) = [command for command in opened if command.endswith(option)]
    assert [*opened[meant].train.labels] == labels


HOLDING = {
    "beside a folder without folders": {"raw/mtb": 6, "raw/road": 6, "new_photos": 6},
    "the same in all": {f"fold{fold}/{label}": 6 for fold in range(2) for label in "ab"},
    "in a training folder": {f"train_shapes/shape_{number}": 9 for number in range(2)}
    | {"plots": 6},
}


@pytest.mark.parametrize("name", HOLDING)
def test_the_folders_at_the_top_are_proposed_last_if_others_may_be_the_classes(
    tmp_path, name
) -> None:
    make(tmp_path, HOLDING[name])

    with pytest.raises(DataError, match=r"\(the folders in .* may be the classes\)") as caught:
        open_folder(tmp_path)

    assert [command.split("=")[-1] for command in caught.value.lists["readings"]][
        -1
    ] == "folders"


CLASSES_ABOVE = {
    "views of a thing": {"dog/front": 8, "dog/side": 8, "cat": 8},
    "colours of two things": {
        **{f"{top}/{color}": 6 for top in ("shoes", "hats") for color in ("red", "blue")},
        "bags": 6,
    },
}


@pytest.mark.parametrize("name", CLASSES_ABOVE)
def test_the_folders_at_the_top_are_proposed_first_if_they_are_named_for_things(
    tmp_path, name
) -> None:
    make(tmp_path, CLASSES_ABOVE[name])

    with pytest.raises(DataError, match=r"may be read in \d ways; run") as caught:
        open_folder(tmp_path)

    assert caught.value.lists["readings"][0].endswith("=folders")


def test_the_first_two_words_of_names_that_begin_with_a_number_may_be_the_class(
    tmp_path,
) -> None:
    make(tmp_path, {"photos": 0})
    cards = ["10_club", "2_heart", "3_spade", "ace_club"]
    for number, card in enumerate(3 * cards):
        name = f"{card}_{number}_rot{number % 2}.jpg"
        (tmp_path / "photos" / name).write_bytes(jpeg(number, (32, 24)))

    with pytest.raises(
        DataError, match="by the names of the files, which may not be"
    ) as caught:
        open_folder(tmp_path)

    (command,) = caught.value.lists["readings"]
    assert [*open_command(command).train.labels] == cards


def test_years_at_the_beginning_of_names_are_no_classes(tmp_path) -> None:
    make(tmp_path, {"photos": 0})
    for number in range(12):
        name = f"{2023 + number % 2}_{('cat', 'dog')[number // 6]}_{number:02}.jpg"
        (tmp_path / "photos" / name).write_bytes(jpeg(number, (32, 24)))

    with pytest.raises(DataError, match="into one subfolder per class, by hand") as caught:
        open_folder(tmp_path)
    assert "classes_from" not in str(caught.value)


def test_a_picture_is_read_once_to_compare_it_and_again_if_it_changes(
    tmp_path, monkeypatch
) -> None:
    root = make(tmp_path, {f"class {letter}": 6 for letter in "abc"})
    images = {
        folder.name: [os.fsencode(file.relative_to(root)) for file in sorted(folder.iterdir())]
        for folder in sorted(root.iterdir())
    }
    read = list[bytes]()
    original = forms._read
    monkeypatch.setattr(
        forms, "_read", lambda root, path: (read.append(path), original(root, path))[1]
    )

    assert forms.find_variants(root, images) == set()
    assert 0 < len(read) == len({*read})
    read.clear()
    os.utime(root / "class a" / "000.jpg", ns=(1, 1))
    forms.find_variants(root, images)
    assert read == [b"class a/000.jpg"]


def test_folders_with_the_same_pictures_are_asked_about(tmp_path) -> None:
    make(tmp_path, {"raw": 8, "noisy": 0})
    for file in (tmp_path / "raw").iterdir():
        with Image.open(file) as image:
            noise = np.random.default_rng(0).integers(0, 30, (24, 32, 3), np.uint8)
            noisy = Image.fromarray(np.asarray(image) // 2 + noise)
        noisy.save(tmp_path / "noisy" / file.name)

    with pytest.raises(DataError, match="noisy, raw may hold the same pictures in several"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, "folders").train.labels == ("noisy", "raw")


def test_pictures_in_another_form_are_found_by_the_numbers_in_their_names(tmp_path) -> None:
    make(tmp_path, {"flowers": 8, "cut": 0, "birds": 8})
    for file in (tmp_path / "flowers").iterdir():
        with Image.open(file) as image:
            image.convert("L").save(tmp_path / "cut" / f"cut_{file.name}")

    with pytest.raises(DataError, match="cut, flowers may hold the same pictures in several"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, leave_out="cut").train.labels == ("birds", "flowers")


def test_of_many_folders_only_those_with_nearly_equal_pictures_are_asked_about(
    tmp_path,
) -> None:
    letters = {f"letter {letter}": 8 for letter in "abcd"} | {"to": 8, "same": 0, "alike": 0}
    make(tmp_path, letters)
    for file in (tmp_path / "letter a").iterdir():
        with Image.open(file) as image:
            pixels = np.asarray(image)
        noise = np.random.default_rng(int(file.stem)).integers(0, 256, pixels.shape, np.uint8)
        for folder, other in (("same", pixels), ("alike", pixels // 2 + noise // 2)):
            Image.fromarray(other).save(tmp_path / folder / file.name)

    with pytest.raises(DataError, match=r"\(letter a, same may hold the same pictures"):
        open_folder(tmp_path)
    shutil.rmtree(tmp_path / "same")
    assert len(open_folder(tmp_path).train.labels) == 6


def test_classes_of_images_of_other_sizes_are_taken(tmp_path) -> None:
    for folder, side in zip(("ships", "cars"), (16, 64), strict=True):
        (tmp_path / folder).mkdir()
        for number in range(4):
            content = jpeg(crc32(f"{folder} {number}".encode()), (side + number, side))
            (tmp_path / folder / f"{folder}{number}.jpg").write_bytes(content)

    assert open_folder(tmp_path).train.labels == ("cars", "ships")


TAKEN: dict[str, tuple[dict[str, int], str]] = {
    "class folders": ({"cat": 3, "dog": 3}, ""),
    "objects with numbers": ({"cat/1": 3, "cat/2": 3, "dog/1": 3, "dog/2": 3}, ""),
    "parts": ({"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/dog": 2, "test": 4}, ""),
    "parts with a folder of images each": (
        {"Training/Images/cat": 3, "Training/Images/dog": 3, "Test/Images": 3}, ""
    ),
    "one folder above": ({"archive/cat": 3, "archive/dog": 3}, "read archive is the data set"),
    "one folder above, with other names": (
        {"archive/train/cat": 4, "archive/train/dog": 4, "archive/val/cat": 4, "archive/val/dog": 4},
        "read archive is the data set",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("folders", "note"), TAKEN.values(), ids=TAKEN)
def test_a_folder_with_one_reading_is_taken_and_unusual_ones_are_named(
    tmp_path, folders, note
) -> None:
    split = open_folder(make(tmp_path, folders))
    assert split.train.labels == ("cat", "dog")
    assert not note or note in split.notes[0]


@pytest.mark.parametrize(
    "name", ["train.csv", "metadata.csv", "labels_flat.csv", "project-1.csv"]
)
@pytest.mark.parametrize("is_equal", [True, False])
def test_class_folders_win_over_a_table_of_the_same_classes_and_others_are_asked_about(
    tmp_path, name, is_equal
) -> None:
    make(tmp_path, {"cat": 6, "dog": 6})
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    rows = [
        f"{file},{place // 6 if is_equal else place % 3 - 1}"
        for place, file in enumerate(files)
    ]
    (tmp_path / name).write_text("\n".join(["filename,label", *rows]))
    if is_equal:
        assert open_folder(tmp_path).train.labels == ("cat", "dog")
        return
    with pytest.raises(DataError, match=rf"classes_from={name} \(-1 4, 0 4, 1 4\)") as caught:
        open_folder(tmp_path)
    assert "data.classes_from=folders (cat 6, dog 6)" in str(caught.value)


def test_columns_with_unusual_headings_are_found_and_asked_about_if_there_are_several(
    tmp_path,
) -> None:
    make(tmp_path, {"images": 12})
    rows = [f"{number:03},{number % 2},{'abc'[number % 3]},{number}.5" for number in range(12)]
    (tmp_path / "HAM.csv").write_text("\n".join(["image_id,sex,dx,age", *rows]))
    with pytest.raises(DataError, match=r"HAM\.csv:sex \(0 6, 1 6\).*HAM\.csv:dx \(a 4, b 4"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, "HAM.csv:dx").train.labels == ("a", "b", "c")
    rows = [f"{number:03}.jpg,{'ab'[number % 2]}" for number in range(12)]
    (tmp_path / "HAM.csv").write_text("\n".join(["name,what", *rows]))
    assert open_folder(tmp_path).train.labels == ("a", "b")


@pytest.mark.parametrize("part", ["images", "train"])
@pytest.mark.parametrize(
    ("heading", "first", "second"),
    [("file,cat,dog", "1,0", "0,1"), ("id, cat, dog", " 1, 0", " 0, 1")],
)
def test_columns_with_1_and_0_are_the_classes(tmp_path, part, heading, first, second) -> None:
    make(tmp_path, {part: 6})
    lines = [f"{number:03}.jpg,{first if number < 3 else second}" for number in range(6)]
    (tmp_path / part / "_classes.csv").write_text("\n".join([heading, *lines]))

    split = open_folder(tmp_path / part)

    assert split.train.labels == ("cat", "dog")
    assert split.train.class_counts().tolist() == [3, 3]


# The headings of a table, its cells beside the name of an image by number, and the columns that are
# proposed as the classes, "" for all together
FLAGS = {
    "a column that is always 1": ("image,defect,version", lambda n: f"{n % 2},1", [":defect"]),
    "a column that is always 0": ("image,defect,crowd", lambda n: f"{n % 2},0", [":defect"]),
    "a column that is 1 once": ("image,defect,blurred", lambda n: f"{n % 2},{n == 5:d}", [":defect"]),
    "another column of 1 and 0": (
        "image,defect,reviewed", lambda n: f"{n % 2},{n % 3 == 0:d}", ["", ":defect", ":reviewed"]
    ),
    "an ID beside two findings": (
        "image,patient,edema,nodule", lambda n: f"p{n // 2},{n % 2},{n % 3 == 0:d}", [":edema", ":nodule"]
    ),
    "an address beside a column per class": (
        "image,url,cat,dog", lambda n: f"http://x/{n},{n % 2},{1 - n % 2}", [":cat"]
    ),
    "a width beside a column per class": (
        "image,width,cat,dog", lambda n: f"{100 + n},{n % 2},{1 - n % 2}", [":cat"]
    ),
    "an age beside two columns": (
        "image,defect,age,flash", lambda n: f"{n % 2},{20 + n},{n % 3 == 0:d}", [":defect", ":flash"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("heading", "cells", "columns"), FLAGS.values(), ids=FLAGS)
def test_columns_with_1_and_0_are_taken_one_by_one_unless_each_image_has_one_class(
    tmp_path, heading, cells, columns
) -> None:
    root = make(tmp_path / "x", {"images": 12})
    lines = [f"{number:03}.jpg,{cells(number)}" for number in range(12)]
    (root / "data.csv").write_text("\n".join([heading, *lines]))
    if len(columns) == 1:
        split = open_folder(root)
        assert split.train.labels == ("0", "1")
        assert f"{root}: read by data.csv{columns[0]}" in split.notes
        return

    with pytest.raises(DataError, match=f"may be read in {len(columns)} ways") as caught:
        open_folder(root)

    commands = caught.value.lists["readings"]
    assert [command.partition("data.csv")[2] for command in commands] == columns
    labels = [open_command(command).train.labels for command in commands]
    assert labels[-1] == ("0", "1")
    assert labels[0] == (("0", "1") if columns[0] else ("defect", "reviewed"))


@pytest.mark.parametrize("part", ["images", "train"])
def test_the_columns_of_a_table_that_is_called_by_classes_are_the_classes(
    tmp_path, part
) -> None:
    make(tmp_path, {part: 6})
    lines = [f"{number:03}.jpg,{number % 2},{number % 3 == 0:d}" for number in range(6)]
    (tmp_path / part / "_classes.csv").write_text("\n".join(["filename,cat,dog", *lines]))

    split = open_folder(tmp_path)

    assert split.train.labels == ("cat", "dog")
    assert split.train.is_multi_label


def test_names_that_the_numbers_of_a_table_may_stand_for_are_told(tmp_path) -> None:
    make(tmp_path, {"images": 6})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    notes = list[str]()
    for first in (0, 1):
        lines = [f"{number:03}.jpg,{first + number % 2}" for number in range(6)]
        (tmp_path / "labels.csv").write_text("\n".join(["file,label", *lines]))
        split = open_folder(tmp_path)
        assert split.train.labels == (str(first), str(first + 1))
        notes += [note for note in split.notes if "perhaps the positions of cat, dog" in note]

    assert len(notes) == 1


def test_a_table_with_a_few_missing_files_is_read_without_them_in_one_line(tmp_path) -> None:
    make(tmp_path, {"images": 100})
    rows = [f"{number:03}.jpg,{'ab'[number % 2]}" for number in range(105)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,classes", *rows]))
    split = open_folder(tmp_path)
    assert len(split.train) == 100
    assert (
        f"{tmp_path}/labels.csv: left out, because they do not exist: 5 images"
        in split.notes[0]
    )


def test_a_table_that_is_not_read_is_named_once_also_in_a_folder_below(tmp_path) -> None:
    make(tmp_path, {"data/clean": 6, "data/noisy": 6})
    files = [path.name for path in sorted(tmp_path.rglob("*.jpg"))]
    boards = {"boards": {f"{number}": file for number, file in enumerate(files)}}
    (tmp_path / "data" / "boards.json").write_text(json.dumps(boards))
    split = open_folder(tmp_path)
    assert split.train.labels == ("clean", "noisy")
    assert len([note for note in split.notes if "boards.json: lists the images" in note]) == 1


BESIDE = {
    "LabelMe, shapes": ("json", lambda name: json.dumps({"shapes": [{"label": name}], "flags": {}})),
    "LabelMe, flags": ("json", lambda name: json.dumps({"shapes": [], "flags": {name: True, "x": False}})),
    "Darwin": ("json", lambda name: json.dumps({"annotations": [{"name": name}]})),
    "Darwin, tags": (
        "json", lambda name: json.dumps({"annotations": [{"name": name, "tag": {}}, {"name": "box"}]})
    ),
    "Supervisely": ("json", lambda name: json.dumps({"objects": [{"classTitle": name}], "tags": []})),
    "Supervisely, tags": ("jpg.json", lambda name: json.dumps({"objects": [], "tags": [{"name": name}]})),
    "a text": ("txt", lambda name: f"{name}\n"),
    "Pascal VOC": ("xml", lambda name: f"<annotation><object><name>{name}</name></object></annotation>"),
}  # fmt: skip


def test_each_kind_of_file_beside_images_and_each_name_of_yolo_has_a_case() -> None:
    assert {f".{suffix.rpartition('.')[2]}" for suffix, _ in BESIDE.values()} == {*cells.BESIDE}
    assert [
        end for end in cells.YOLO_NAMES if not any(name.endswith(end) for name in YOLO)
    ] == []


@pytest.mark.parametrize("folder", ["images", "annotations"])
@pytest.mark.parametrize(("suffix", "write"), BESIDE.values(), ids=BESIDE)
def test_a_file_beside_each_image_has_its_class(tmp_path, folder, suffix, write) -> None:
    make(tmp_path, {"images": 8})
    (tmp_path / folder).mkdir(exist_ok=True)
    for number in range(8):
        label = ("cat", "dog")[number % 2]
        (tmp_path / folder / f"{number:03}.{suffix}").write_text(write(label))
    split = open_folder(tmp_path)
    assert split.train.class_counts().tolist() == [4, 4]
    assert "by the files beside the images" in "\n".join(split.notes)
    assert open_folder(tmp_path, FILES).train.labels == ("cat", "dog")


# The files with the names of YOLO's classes, and the folders of images and of texts
YOLO = {
    "data.yaml": ("names: ['cat', 'dog']", "{part}/images", "{part}/labels"),
    "x/data.yml": ("path: .\nnames:\n  0: cat\n  1: dog\n", "images/{part}", "labels/{part}"),
    "classes.txt": ("cat\ndog\n", "{part}", "{part}"),
    "obj.names": ("cat\ndog\n", "{part}", "{part}"),
    "x/_darknet.labels": ("cat\ndog\n", "{part}", "{part}"),
}


@pytest.mark.parametrize("name", YOLO)
def test_yolo_texts_and_their_parts_are_read_with_the_names_of_the_classes(
    tmp_path, name
) -> None:
    names, images, texts = YOLO[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(names)
    for part in ("train", "valid", "test"):
        make(tmp_path, {images.format(part=part): 6})
        folder = tmp_path / texts.format(part=part)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(6):
            (folder / f"{number:03}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 1e-05\n")

    split = open_folder(tmp_path)

    assert split.train.labels == ("cat", "dog")
    assert split.train.class_counts().tolist() == [3, 3]
    assert all("valid" in split.held_out.identity(index) for index in range(6))
    assert len(split.held_out) == 6


# The text beside the first of four images, and what is said about it
NO_CLASSES = {
    "a class without a name": ("1 0.5 0.5 0.25 0.25", "class 1 has no name; write all names to classes"),
    "several lines": ("a cat\na dog", "does not give its image a class (it has several lines)"),
    "a caption": ("a cat on a mat", "the texts beside the images are no classes, because most differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CLASSES)
def test_texts_that_are_no_classes_are_refused_with_the_reason(tmp_path, name) -> None:
    text, said = NO_CLASSES[name]
    make(tmp_path, {"images": 4})
    for number in range(4):
        content = text if number == 0 else f"photo {number}"
        (tmp_path / "images" / f"{number:03}.txt").write_text(content)

    with pytest.raises(DataError) as caught:
        open_folder(tmp_path)

    assert said in str(caught.value)


def test_captions_beside_the_images_of_class_folders_change_nothing(tmp_path) -> None:
    make(tmp_path, {"cat": 4, "dog": 4})
    for file in [*tmp_path.rglob("*.jpg")]:
        file.with_suffix(".txt").write_text(f"photo {file.stem} of a {file.parent.name}")

    assert open_folder(tmp_path).train.labels == ("cat", "dog")


def test_a_folder_with_copies_of_the_others_is_left_out_and_named(tmp_path) -> None:
    make(tmp_path, {"cat": 4, "dog": 4, "cache": 0})
    for file in [*tmp_path.glob("cat/*.jpg"), *tmp_path.glob("dog/*.jpg")]:
        shutil.copy(file, tmp_path / "cache" / f"{file.parent.name}-{file.name}")
    split = open_folder(tmp_path)
    assert split.train.labels == ("cat", "dog")
    assert f"{tmp_path}: left out, because they hold copies of the others: cache" in split.notes


@pytest.mark.parametrize("file", ["x.ipynb", "x.py", "x.npy", "x.md"])
def test_a_folder_of_other_files_is_no_class_and_one_of_unread_images_is(
    tmp_path, file
) -> None:
    make(tmp_path, {"cat": 3, "dog": 3, "more": 0})
    (tmp_path / "more" / file).write_text("x")
    split = open_folder(tmp_path)
    assert split.train.labels == ("cat", "dog")
    assert f"{tmp_path}: left out, because they hold no images: more" in split.notes
    (tmp_path / "more" / file).rename(tmp_path / "more" / "x.tif")
    with pytest.raises(DataError, match=r"more: no images in this class folder"):
        open_folder(tmp_path)


def test_data_check_has_no_other_settings(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.lr: not known here; set data\.classes_from"):
        check(tmp_path, set=("data.lr=1",))


WRONG_SETTINGS = {
    "data.leave_out=[1]": r"data\.leave_out: must be text",
    "data.classes_from=(": r"data\.classes_from: no regular expression",
}


@pytest.mark.parametrize(("setting", "problem"), WRONG_SETTINGS.items())
def test_data_check_names_a_setting_that_is_no_text_or_pattern(
    tmp_path, setting, problem
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(tmp_path, set=(setting,))


@pytest.mark.parametrize("name", ["7", "true", "null", "1979-05-27", "a,b", " a", '"a"', "[a]"])
def test_the_command_that_leaves_out_a_folder_names_it_whatever_it_is_called(
    tmp_path, name
) -> None:
    make(tmp_path, {"a": 3, "b": 3, name: 3})

    command = Reading(tmp_path, "without it", "folders", leave_out=name).command

    assert [*check_command(command)] == ["a", "b"]


NEAR = [
    ("ship", "ships"),
    ("cat(0)", "cat"),
    ("ants", "ants_image"),
    ("Late_blight", "Late blight"),
    ("bus", "buses"),
    ("house", "houses"),
    ("cherry", "cherries"),
    ("cat_train", "cat_test"),
]


@pytest.mark.parametrize("inside", ["", "above"])
@pytest.mark.parametrize(("trained", "validated"), NEAR)
def test_classes_of_parts_are_paired_by_their_words_and_the_part_that_fits_is_named(
    tmp_path, trained, validated, inside
) -> None:
    root = tmp_path / inside
    folders = {f"train/{trained}": 3, "train/x": 3, f"val/{validated}": 2, "val/x": 2}
    make(root, folders | {f"test/{trained}": 2, "test/x": 2})
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path)
    assert f"val/{validated}: is it {trained!r} of the training images?" in str(caught.value)
    _, _, command = str(caught.value).partition("test has these classes: ")
    assert len(open_command(command).held_out) == 4


def make_with_table(root: Path, name: str = "HAM.csv") -> Path:
    """Make a folder with ten images and a table of their classes `a` and `b`, and of their ages."""
    make(root, {"images": 10})
    rows = [f"{number:03},{'ab'[number % 2]},{number}.5" for number in range(10)]
    (root / name).write_text("\n".join(["image_id,dx,age", *rows]))
    return root


def make_with_copies(root: Path) -> Path:
    """Make two class folders, and one with copies of all their images."""
    make(root, {"a": 5, "b": 5, "cache": 0})
    for file in [*root.glob("a/*.jpg"), *root.glob("b/*.jpg")]:
        shutil.copy(file, root / "cache" / f"{file.parent.name}-{file.name}")
    return root


# Folders that are read unasked, and how
READ = {
    "class folders": (lambda root: make(root, {"a": 5, "b": 5}), AS_IT_IS),
    "one folder above": (
        lambda root: make(root, {"set/a": 5, "set/b": 5, "notes": 0}), FolderReading(folder="set")
    ),
    "two folders above, with a table": (
        lambda root: (make_with_table(root / "one/two"), root)[1],
        FolderReading(folder="one/two", classes_from="HAM.csv:dx"),
    ),
    "a column": (make_with_table, FolderReading(classes_from="HAM.csv:dx")),
    "copies": (make_with_copies, FolderReading(leave_out="cache")),
}  # fmt: skip


@pytest.mark.parametrize(("build", "reading"), READ.values(), ids=READ)
def test_a_reading_is_recorded_and_other_images_are_read_like_it(
    tmp_path, build, reading
) -> None:
    split = open_folder(build(tmp_path / "trained"))
    assert split.reading == reading

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
    with pytest.raises(ValidationError, match="leads out of the folder of the images"):
        FolderReading.model_validate(values)


@pytest.mark.parametrize("classes_from", ["..", r"^\D+", "tables/a.csv:b/../c"])
def test_a_pattern_is_recorded_and_a_column_is_no_path(classes_from) -> None:
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
    assert f"{tmp_path}: no images of 1 of 3 classes: b" in lines
    assert f"{tmp_path / name}: left out, of no class: other" in lines

    with pytest.raises(DataError, match=r"other is no class .* rename these classes"):
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


def test_what_is_too_long_for_a_name_is_no_table_and_no_folder(tmp_path) -> None:
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


def test_a_spreadsheet_beside_folders_is_an_error_that_every_command_can_mend(tmp_path) -> None:
    make(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "labels.xlsx").touch()
    with pytest.raises(DataError, match=r"or rename it if the folders are the classes$"):
        open_evaluation_images(tmp_path, ("a", "b"))


def test_the_validation_part_is_not_one_that_the_run_left_out(tmp_path) -> None:
    make(
        tmp_path,
        {"train/a": 3, "train/b": 3, "val/as": 2, "val/b": 2, "test/a": 2, "test/b": 2},
    )
    split = open_folder(tmp_path, leave_out="val")
    images = open_evaluation_images(tmp_path, ("a", "b"), reading=split.reading)
    assert [image.split("/")[0] for image in map(images.identity, range(2))] == ["a", "a"]
    assert images.root == tmp_path / "test"


# Names of folders: classes, parts, copies, and what may be neither
NAMES = (
    *("cat", "dog", "Dog", "bird", "cats", "bus", "fox", "1", "2", "10", "audi a3", "audi a4"),
    *("train", "val", "test", "training", "cat_test", "train_shapes", "fold0", "fold1"),
    *(
        "fox (2)",
        "cat - Copy",
        "New folder",
        "backup",
        "2024-05-01",
        "2024-05-02",
        "lab1",
        "lab3",
    ),
    *("unknown", "other", "results", "samples", "images", "raw", "masks", "figures", "data"),
)


def draw_names(names: Sequence[str], random: Random, count: int) -> list[str]:
    """Draw *count* names, or fewer: of those that differ in case only, which are one on macOS, the first."""
    drawn = dict[str, str]()
    for name in random.sample(names, count):
        drawn.setdefault(name.lower(), name)
    return [*drawn.values()]


def draw_folder(root: Path, random: Random) -> str:
    """Write folders of up to seven images: parts with equal classes, or whatever comes; list them."""
    images = [jpeg(number, (8, 6)) for number in range(12)]
    if random.random() < 0.4:
        parts = ["train", *random.sample(("val", "test", "images", "unknown"), 2)]
        classes = draw_names(NAMES[:12], random, random.randint(2, 3))
        folders = [f"{part}/{name}" for part in parts for name in classes]
        folders = [name for name in folders if random.random() < 0.9]
    else:
        folders = []
        for name in draw_names(NAMES, random, random.randint(2, 5)):
            inner = draw_names(NAMES, random, random.choice((0, 0, 0, 1, 2, 3)))
            folders += [f"{name}/{each}" for each in inner] or [name]

    for name in folders:
        (root / name).mkdir(parents=True)
        first = random.choice((0, 3, 5))
        for number in range(random.choice((0, 1, 2, 3, 5, 7, 7, 7))):
            (root / name / f"{first + number}.jpg").write_bytes(images[first + number])
        if random.random() < 0.1:
            (root / name / random.choice(("notes.txt", "a.py", "x.zip"))).write_text("other")

    paths = sorted(file.relative_to(root).as_posix() for file in root.rglob("*"))
    return " ".join(path for path in paths if "." not in path)


def describe_reading(root: Path) -> dict[str, Any]:
    """Open *root*; return the numbers of images by part and class, or the commands of an error.

    Of notes and errors, the names of classes and the numbers are told, in any words.
    """
    told = re.compile("|".join([r"\d+", *sorted(NAMES[:12], reverse=True)]))
    try:
        opened = open_folder(root)
    except DataError as error:
        lines = [str(error).replace(str(root), "")]
        commands = error.lists.get("readings", ())
        found: dict[str, Any] = {
            "asked": [line.replace(str(root), "ROOT") for line in commands]
        }
    else:
        lines = [line.replace(str(root), "") for line in opened.notes]
        found = {}
        for part in ("train", "held_out"):
            images = getattr(opened, part)
            counts = images.class_counts().tolist() if len(images) else []
            found[part] = dict(zip(images.labels, counts, strict=False))
    return {**found, "told": [" ".join(told.findall(line)) for line in lines]}


def describe_drawn(draw: Callable[[Path, Random], str]) -> dict[str, Any]:
    """Describe the readings of 160 folders that *draw* writes here; it returns what is in a folder."""
    drawn = {}
    for number in range(160):
        root = Path(f"drawn{number}")
        content = draw(root, Random(number))
        drawn[f"{number}: {content}"] = describe_reading(root)
    return drawn


@pytest.mark.slow
def test_drawn_folders_are_read_as_their_golden_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Names meet here that no other test puts together, with numbers of images below and above limits."""
    monkeypatch.chdir(tmp_path)  # whose name may have to be quoted in a command
    check_golden("photos/readings", describe_drawn(draw_folder), pytestconfig)
