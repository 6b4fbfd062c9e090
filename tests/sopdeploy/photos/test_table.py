"""`labels.csv`: images with any number of classes, their split, and one line for everything that is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import DataError
from sopdeploy.photos import cells
from sopdeploy.photos.check import check_data
from sopdeploy.photos.copies import group_photographs
from sopdeploy.photos.evaluation_images import open_evaluation_images
from sopdeploy.photos.folder import open_folder
from sopdeploy.photos.split import choose_held_out, divide
from tests.sopdeploy.photos.test_readings import describe_drawn
from tests.support.counted import counted
from tests.support.golden import check_golden
from tests.support.small_data import jpeg
from tests.support.two_objects import CLASSES, draw_scenes

GOOD = "file,classes\na.png,cat|dog\nb.png,\nsub/c.png, dog \n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("a.png", "b.png", "sub/c.png", "d.png")):
        Image.new("RGB", (40, 40), (50 * number, 9, 9)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return folder


def rows(folder: Path, labels: tuple[str, ...] = ("cat", "dog")) -> dict[str, list[float]]:
    images = open_evaluation_images(folder, labels, multi_label=True)
    return {
        str(images.path(i).relative_to(folder)): images.targets[i].tolist()
        for i in range(len(images))
    }


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\ufeff" + GOOD.replace("\n", "\r\n"),
        'classes,file\n"cat|dog",./a.png\n\n,b.png\ndog,sub/c.png\n',
        'file, Classes \na.png, "cat|dog"\nb.png, \nsub\\c.png, dog\n',
        "file_name,label\na.png,cat;dog\nb.png,\nc.png,dog\n",
        "image_id\tclasses\na\tcat ; dog\nb\t\nc\tdog\n",
    ],
)
def test_targets_have_a_one_for_every_class_of_an_image(folder: Path, text: str) -> None:
    assert rows(write(folder, text)) == {"a.png": [1, 1], "b.png": [0, 0], "sub/c.png": [0, 1]}


COMPOSED, DECOMPOSED = "\u00c4pfel", "A\u0308pfel"  # as Linux and macOS write the name


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("on_disk", [COMPOSED, DECOMPOSED])
def test_a_table_finds_files_and_classes_in_any_encoding(
    folder: Path, listed: str, on_disk: str
) -> None:
    (folder / on_disk).mkdir()
    shutil.copy(folder / "a.png", folder / on_disk / f"{on_disk}.png")
    write(
        folder,
        f"file,classes\nb.png,{COMPOSED}\n{listed}/{listed}.png,{DECOMPOSED}|dog\nd.png,dog\n",
    )
    found = rows(folder, (on_disk, "dog"))
    assert found == {"b.png": [1, 0], f"{on_disk}/{on_disk}.png": [1, 1], "d.png": [0, 1]}
    assert check_data(folder).parts[0].classes == {"dog": 2, COMPOSED: 2}


def test_a_file_that_two_rows_name_differently_is_listed_twice(folder: Path) -> None:
    (folder / f"{DECOMPOSED}.png").write_bytes((folder / "a.png").read_bytes())
    for pair in ((f"{COMPOSED}.png", f"{DECOMPOSED}.png"), ("sub/c.png", "sub\\c.png")):
        with pytest.raises(DataError, match=r"line 3: .* is also the file of line 2"):
            open_folder(write(folder, f"file,classes\n{pair[0]},cat\n{pair[1]},dog\n"))


def test_a_backslash_in_the_name_of_a_file_is_read_as_it_is(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sub\\c.png")
    assert list(rows(write(folder, "file,classes\nsub\\c.png,cat\nsub/c.png,dog\n"))) == [
        "sub\\c.png",
        "sub/c.png",
    ]


def test_classes_of_a_table_that_are_easily_confused_are_named(folder: Path) -> None:
    table = "file,classes\na.png,Hat\nb.png,hat\nsub/c.png,red  cat\nd.png,red cat\n"
    notes = check_data(write(folder, table)).notes
    assert (
        f"{folder}/labels.csv: 'Hat' and 'hat' are different classes; rename one if they are the same"
        in notes
    )
    assert any("'red  cat' and 'red cat'" in note for note in notes)
    with pytest.raises(
        DataError, match=r"remove them \('Hat' and 'hat' are different classes; rename one"
    ):
        open_evaluation_images(folder, ("hat", "red cat", "red  cat"), multi_label=True)


PROBLEMS = {
    "file,classes\n": "lists no images",
    "file,classes\na.png,cat|dog\na.png,dog\n": "line 3: a.png is also the file of line 2",
    "file,classes\na.png,cat|dog\nx.png,cat\ny.png,\nz.png,\n": "line 3: x.png does not exist, and 2 more files",
    "file,classes\n..\\a.png,cat\n": "line 2: '..\\\\\\\\a.png' is not the path of an image, relative to",
    "file,classes\n../a.png,cat\n": "line 2: '../a.png' is not the path of an image, relative to",
    "file,classes\nsub,cat\n": "line 2: 'sub' is not the path of an image",
    "file,classes\na.png,cat||dog\n": "line 2: 'cat||dog' has an empty class name",
    "file,classes\na.png,cat,dog\n": "line 2: does not have 2 columns",
    "file,classes\na.png,cat\nb.png,\n": r"has fewer than two classes \(cat\)",
    "file,classes,split\na.png,cat|dog,test\n": "line 2: split is 'test'; write train or val",
    "file,classes,split\na.png,cat|dog,train\n": "no image of split val has a class",
    "file,classes,split\na.png,cat,train\nb.png,dog,val\n": "no training image of dog",
    GOOD: "a classifier needs two classes of two images or more; add images of cat",
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_an_invalid_table_is_rejected_in_one_line(folder: Path, text: str) -> None:
    path = write(folder, text)
    with pytest.raises(DataError, match=f"{path}(/labels.csv)?: {PROBLEMS[text]}") as caught:
        open_folder(path)
    assert "\n" not in str(caught.value)


INVALID = (
    "../a.png,cat",
    "a.png,cat,dog",
    "a.png,cat||dog",
    "a.png,cat\na.png,dog",
    '"a.png"x,cat',
)


@pytest.mark.parametrize("line", INVALID)
def test_the_lines_after_an_invalid_one_are_not_read(folder: Path, line: str) -> None:
    def refuse() -> None:
        with pytest.raises(DataError):
            open_folder(folder)

    costs = []
    for more in (0, 5000):
        write(folder, f"file,classes\n{line}\n" + "b.png,cat\n" * more)
        costs.append(counted(refuse).calls)
    assert costs[1] < costs[0] + 100


def test_bytes_that_are_not_utf8_and_open_quotes_are_rejected(folder: Path) -> None:
    cases = {
        "file,classes\na.png,B\u00e4r\n".encode("cp1252"): r"\(line 2 is not UTF-8\)",
        b"\xef\xbb\xbffile,classes\n\xff.png,cat\n": r"\(line 2 is not UTF-8\)",
        "file,classes\n".encode("utf-16") + b"\x00": r"\(it is not UTF-16\)",
        b'file,classes\n"a.png,cat\n': ".*",
    }
    for content, problem in cases.items():
        (folder / "labels.csv").write_bytes(content)
        with pytest.raises(
            DataError,
            match=rf"labels\.csv: cannot be read {problem}; write a CSV file in UTF-8",
        ):
            open_folder(folder)


def test_the_table_counts_and_not_what_it_was_exported_from(folder: Path) -> None:
    (folder / "labels.xlsx").touch()
    assert rows(write(folder, GOOD)) == {"a.png": [1, 1], "b.png": [0, 0], "sub/c.png": [0, 1]}


TABLE = "file,classes\r\na.png,Ä|dog\r\nb.png,\r\nsub/c.png,dog\r\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_the_encoding_of_a_table_is_that_of_its_byte_order_mark(
    folder: Path, encoding: str
) -> None:
    mark = "\ufeff" if encoding in {"utf-16-le", "utf-16-be"} else ""
    (folder / "labels.csv").write_bytes((mark + TABLE).encode(encoding))
    assert rows(folder, ("Ä", "dog")) == {"a.png": [1, 1], "b.png": [0, 0], "sub/c.png": [0, 1]}


# What is at the place of `labels.csv` beside class folders, and what the error says.
NO_TABLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "is empty; list the images and their classes in it, or remove it"),
    "blank": (lambda path: path.write_text("\ufeff \n\n", "utf-8"), "is empty"),
    "a pipe": (os.mkfifo, r"cannot be read \(not a regular file\); replace it by a CSV file, or remove it"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), r"cannot be read \(not a regular file\)"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), r"cannot be read \(No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), r"cannot be read \(Too many levels"),
    "UTF-16 without a mark": (
        lambda path: path.write_text(GOOD, "utf-16-le"), r"cannot be read \(it has null characters, .*UTF-8"
    ),
    "half a character": (lambda path: path.write_bytes(b"\xff\xfef"), r"cannot be read \(.*; write a CSV"),
    "no text": (lambda path: path.write_bytes(bytes(range(255, 0, -1))), r"cannot be read \(.*; write a CSV"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), NO_TABLES.values(), ids=NO_TABLES)
def test_a_table_that_cannot_be_read_is_never_ignored(folder: Path, make, message: str) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for name in ("a.png", "d.png"):
            shutil.copy(folder / name, folder / label / name)
    make(folder / "labels.csv")
    for read in (
        open_folder,
        check_data,
        lambda path: open_evaluation_images(path, ("cat", "dog")),
    ):
        with pytest.raises(DataError, match=rf"labels\.csv: {message}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_table_without_end_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MAX_TABLE_BYTES", len(GOOD) - 1)
    with pytest.raises(
        DataError, match=r"labels\.csv: cannot be read \(larger than \d+ bytes, the limit\)"
    ):
        open_folder(write(folder, GOOD))


def test_networks_reject_tables_of_other_classes_and_the_other_kind_of_data(
    folder: Path,
) -> None:
    with pytest.raises(
        DataError, match=r"line 2: has no class or several, but the network predicts one"
    ):
        open_evaluation_images(write(folder, GOOD), ("cat", "dog"))
    with pytest.raises(DataError, match="dog are not classes of the network"):
        open_evaluation_images(folder, ("cat", "cow"), multi_label=True)
    with pytest.raises(DataError, match=r"holds no class folders and no labels\.csv"):
        open_evaluation_images(folder / "sub", ("cat", "dog"), multi_label=True)


def test_a_table_of_other_columns_next_to_class_folders_is_an_error(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for name in ("a.png", "d.png"):
            shutil.copy(folder / name, folder / label / name)
    shutil.rmtree(folder / "sub")
    with pytest.raises(
        DataError, match=r"name, breed; .*or rename the file if the folders are the classes"
    ):
        open_folder(write(folder, "name,breed\nx,y\n"))


@pytest.mark.slow
def test_every_class_is_split_and_a_column_chooses_the_split(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", count=60)
    opened = open_folder(scenes)
    split, again = (
        divide(
            opened,
            choose_held_out(opened.train, group_photographs(opened.train).groups, 0.2, 0),
        )
        for _ in range(2)
    )
    assert split.train.labels == CLASSES
    assert len(split.train) + len(split.held_out) == 60
    held = split.held_out.targets.sum(axis=0)
    total = split.train.targets.sum(axis=0) + held
    assert (np.abs(held - 0.2 * total) <= 3).all()
    assert (split.held_out.paths == again.held_out.paths).all()
    lines = (scenes / "labels.csv").read_text().splitlines()
    parts = ["split", *["val"] * 20, *["train"] * 40]
    write(scenes, "\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True)))
    split = open_folder(scenes)
    assert [len(split.train), len(split.held_out)] == [40, 20]
    assert len(open_evaluation_images(scenes, CLASSES, multi_label=True)) == 20


def test_the_check_counts_classes_and_finds_unlisted_and_broken_images(folder: Path) -> None:
    (folder / "sub" / "c.png").write_bytes(b"no image")
    found = json.loads(check_data(write(folder, GOOD)).model_dump_json())
    assert [(part["name"], part["count"], part["classes"]) for part in found["parts"]] == [
        ("all", 3, {"cat": 1, "dog": 2})
    ]
    assert found["notes"] == [f"not listed in labels.csv: 1 image: {folder / 'd.png'}"]
    assert "sub/c.png: this is not an image" in found["unreadable"][0]
    assert "cat: only one image" in found["too_few"][0]


def test_a_name_of_two_images_needs_its_folder(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sub" / "a.png")
    with pytest.raises(
        DataError, match=r"line 2: 'a' is not the path of an image.* or the name of one image"
    ):
        open_folder(write(folder, "file,classes\na,cat\nb,dog\n"))
    assert rows(write(folder, "file,classes\na.png,cat\nb,dog\n")) == {
        "a.png": [1, 0],
        "b.png": [0, 1],
    }


LISTED = [f"{label}_{number:03}" for label in ("nevus", "melanoma") for number in range(6)]
TABLES = {
    "list.txt": "".join(f"{name}.png {number}\n" for number, name in enumerate(LISTED)),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{name}.png", "text": "x"}) + "\n" for name in LISTED
    ),
    "_annotations.coco.json": json.dumps(
        {"images": [{"file_name": f"all/{name}.png"} for name in LISTED]}
    ),
    "anything.tsv": "\n".join(f"x\ty/{name}.png" for name in LISTED),
}


def coco(categories_of_images: dict[str, list[int]]) -> str:
    names = [*categories_of_images]
    found = {
        "images": [{"id": 7 + number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": 7 + names.index(name), "category_id": category}
            for name, categories in categories_of_images.items()
            for category in categories
        ],
        "categories": [{"id": 1, "name": "Cat"}, {"id": 2, "name": "dog"}],
    }
    return json.dumps(found)


def label_of(category: int) -> str:
    return ("Cat", "dog")[category - 1]


def cvat(label_of_image: dict[str, str], shape: str = "tag") -> str:
    """Write CVAT's XML with a tag or a shape for each image."""
    images = "".join(
        f'<image name="{name}"><{shape} label="{label}"/></image>'
        for name, label in label_of_image.items()
    )
    return f"<annotations><version>1.1</version>{images}</annotations>"


def via(category_of_image: dict[str, int], attribute: str | None) -> dict[str, Any]:
    """Write VIA's images with an *attribute* of the file, or without one, with two regions each."""
    return {
        f"{name}9": {
            "filename": name,
            "size": 9,
            "regions": []
            if attribute
            else 2 * [{"region_attributes": {"kind": {label_of(one): True, "x": False}}}],
            "file_attributes": {attribute: label_of(one)} if attribute else {},
        }
        for name, one in category_of_image.items()
    }


CATS = {f"{number}.png": 1 + number % 2 for number in range(6)}  # the category of each image
EXPORTED = {
    "_classes.csv": "filename, Cat, dog\n"
    + "".join(f"{name}, {2 - one}, {one - 1}\n" for name, one in CATS.items()),
    "metadata.csv": "file_name,label\n"
    + "".join(f"{name},{('Cat', 'dog')[one - 1]}\n" for name, one in CATS.items()),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": name, "label": ("Cat", "dog")[one - 1]}) + "\n"
        for name, one in CATS.items()
    ),
    "_annotations.coco.json": coco({name: [one] for name, one in CATS.items()}),
    "annotations.xml": cvat({name: label_of(one) for name, one in CATS.items()}),
    "via_export_csv.csv": "filename,file_size,file_attributes,region_count,region_id,"
    "region_shape_attributes,region_attributes\n"
    + "".join(
        f'{name},9,"{{""class"":""{label_of(one)}""}}",0,0,"{{}}","{{}}"\n'
        for name, one in CATS.items()
    ),
    "via_project_1.json": json.dumps({"_via_img_metadata": via(CATS, "class")}),
    "via_region_data.json": json.dumps(via(CATS, None)),
    "labels_my-project_2026-11-28.csv": "".join(
        f'{name},"[{label_of(one)}]"\n' for name, one in CATS.items()
    ),
    "labels_my-project_2026-11-28.json": json.dumps(
        [{"image": name, "annotations": [label_of(one)]} for name, one in CATS.items()]
    ),
}


def write_export(folder: Path, name: str, text: str) -> None:
    folder.mkdir()
    (folder / name).write_text(text, encoding="utf-8")
    for number, image in enumerate(CATS):
        Image.new("RGB", (40, 40), (9 * number, 9, 9)).save(folder / image)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_of_label_tools_are_read_in_the_folder_of_the_images_and_in_parts(
    tmp_path: Path, name: str
) -> None:
    write_export(tmp_path / "flat", name, EXPORTED[name])
    (tmp_path / "parts").mkdir()
    for part in ("train", "valid"):
        write_export(tmp_path / "parts" / part, name, EXPORTED[name])
    expected = [one - 1 for one in CATS.values()]
    flat, parts = open_folder(tmp_path / "flat"), open_folder(tmp_path / "parts")
    assert flat.train.labels == parts.train.labels == ("Cat", "dog")
    evaluated = [
        open_evaluation_images(tmp_path / data, ("Cat", "dog")) for data in ("flat", "parts")
    ]
    for images in (flat.train, parts.train, parts.held_out, *evaluated):
        assert images.targets.tolist() == expected
    assert f"{tmp_path}/parts/train/{name}: the classes are in it" in parts.notes


@pytest.mark.parametrize("suffix", ["", ".png"])
def test_a_table_of_ids_and_labels_is_read_beside_a_folder_of_images_without_classes(
    tmp_path: Path, suffix: str
) -> None:
    for number in range(6):
        for part, image in (("train", f"{number}a.png"), ("test", f"{number}b.png")):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.new("RGB", (40, 40), (9 * number, 9, 9)).save(tmp_path / part / image)
    lines = [f"{number}a{suffix},{('Cat', 'dog')[number % 2]}\n" for number in range(6)]
    (tmp_path / "train.csv").write_text("id,label\n" + "".join(lines), encoding="utf-8")
    opened = open_folder(tmp_path)
    assert opened.train.labels == ("Cat", "dog")
    assert opened.train.targets.tolist() == [0, 1] * 3
    assert any("not listed in train.csv: 6 images" in note for note in opened.notes)
    (tmp_path / "train.csv").write_text("id,label\n" + "".join(lines[1:]), encoding="utf-8")
    with pytest.raises(DataError, match=r"holds no class folders and no labels\.csv"):
        open_folder(tmp_path)


UNCERTAIN = {
    "_classes.csv": EXPORTED["_classes.csv"].replace("0.png, 1,", "0.png, 2,"),
    "_annotations.coco.json": coco(
        {name: [one] for name, one in CATS.items()} | {"0.png": [1, 2]}
    ),
    "annotations.xml": EXPORTED["annotations.xml"].replace("<tag label", "<note kind"),
    "via_project_1.json": EXPORTED["via_project_1.json"].replace(
        '"class": "Cat"', '"class": "Cat", "caption": "a cat"', 1
    ),
    "via_export_csv.csv": EXPORTED["via_export_csv.csv"].replace('""class"":""Cat""', "x", 1),
}


# Without the class of the first image
UNLABELLED = {
    "annotations.xml": EXPORTED["annotations.xml"].replace('<tag label="Cat"/>', "", 1),
    "via_project_1.json": EXPORTED["via_project_1.json"].replace('"class": "Cat"', "", 1),
    "via_export_csv.csv": EXPORTED["via_export_csv.csv"].replace('""class"":""Cat""', "", 1),
    "_annotations.coco.json": coco({name: [one] for name, one in CATS.items()} | {"0.png": []}),
    "project-1.json": json.dumps([
        {
            "data": {"image": name},
            "annotations": [{"result": [{
                "type": "rectanglelabels", "value": {"rectanglelabels": [label_of(one)]},
            }]}] if number else [],
        }
        for number, (name, one) in enumerate(CATS.items())
    ]),
    "project-2.json": json.dumps([
        {"image": name, "choice": label_of(one) if number else None}
        for number, (name, one) in enumerate(CATS.items())
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLABELLED)
def test_an_image_that_a_label_tool_lists_without_a_class_is_left_out_and_named(
    tmp_path: Path, name: str
) -> None:
    write_export(tmp_path / "photos", name, UNLABELLED[name])
    opened = open_folder(tmp_path / "photos")
    assert opened.train.targets.tolist() == [one - 1 for one in CATS.values()][1:]
    note = (
        f"{tmp_path}/photos/{name}: left out, because they have no class there: 1 image: 0.png"
    )
    assert note in opened.notes
    assert not any("not listed" in note for note in opened.notes)


TWO_CLASSES = {
    "metadata.csv": EXPORTED["metadata.csv"].replace("Cat", "Cat|dog", 1),
    "metadata.jsonl": EXPORTED["metadata.jsonl"].replace('"Cat"', '"Cat|dog"', 1),
    "annotations.xml": EXPORTED["annotations.xml"].replace(
        '<tag label="Cat"/>', '<tag label="Cat"/><tag label="dog"/>', 1
    ),
    "labels_my-project_2026-11-28.json": EXPORTED["labels_my-project_2026-11-28.json"].replace(
        '"Cat"', '"Cat", "dog"', 1
    ),
}
# Of the first image
PLACES = {
    "metadata.csv": "line 2",
    "metadata.jsonl": "line 1",
    "annotations.xml": "image 1",
    "labels_my-project_2026-11-28.json": "image 1",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_row_is_named_by_its_line_or_in_a_file_without_lines_by_the_number_of_its_image(
    tmp_path: Path, name: str
) -> None:
    write_export(tmp_path / "photos", name, TWO_CLASSES[name])
    with pytest.raises(DataError, match=f"{name}: {PLACES[name]}: has no class or several"):
        open_evaluation_images(tmp_path / "photos", ("Cat", "dog"))


def test_the_first_line_of_via_1_is_a_comment(tmp_path: Path) -> None:
    name = "via_export_csv.csv"
    write_export(tmp_path / "photos", name, f"#{EXPORTED[name]}")
    assert open_folder(tmp_path / "photos").train.labels == ("Cat", "dog")


@pytest.mark.parametrize("shape", ["tag", "box"])
def test_tags_or_shapes_of_cvat_are_classes(tmp_path: Path, shape: str) -> None:
    labels = {name: label_of(one) for name, one in CATS.items()}
    write_export(tmp_path / "photos", "annotations.xml", cvat(labels, shape))
    assert open_folder(tmp_path / "photos").train.targets.tolist() == [
        one - 1 for one in CATS.values()
    ]


@pytest.mark.parametrize("name", UNCERTAIN)
def test_an_export_that_does_not_give_each_image_its_classes_is_named(
    tmp_path: Path, name: str
) -> None:
    write_export(tmp_path / "photos", name, UNCERTAIN[name])
    with pytest.raises(DataError, match=rf"{name}: lists the images, but is not read"):
        open_folder(tmp_path / "photos")


def test_a_part_without_the_table_of_another_one_is_named(tmp_path: Path) -> None:
    write_export(tmp_path / "train", "metadata.csv", EXPORTED["metadata.csv"])
    write_export(tmp_path / "val", "notes.txt", "")
    with pytest.raises(DataError, match=r"val: has no table as .*train/metadata\.csv; add one"):
        open_folder(tmp_path)


@pytest.mark.parametrize("layout", ["shards", "one folder", "train"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_lists_the_images_is_named_with_the_next_step(
    tmp_path: Path, name: str, layout: str
) -> None:
    for number, image in enumerate(LISTED):
        shard = {"shards": f"part_{number % 2}", "one folder": "images", "train": "train"}[
            layout
        ]
        (tmp_path / shard).mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (9 * number, 9, 9)).save(tmp_path / shard / f"{image}.png")
    beside = tmp_path / "train" if layout == "train" else tmp_path
    (beside / name).write_text(TABLES[name], encoding="utf-8")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path)
    told = str(caught.value)
    if layout == "shards":  # only the user knows whether these are classes
        assert "--set data.classes_from=folders (part_0 6, part_1 6)" in told
    assert (
        f"{beside / name}: lists the images, but is not read; if the classes are in it, save it"
        in told
    )
    assert f"{tmp_path}/labels.csv with the columns file,classes" in told


@pytest.mark.parametrize(
    "text", ["", "one cat and two dogs, photographed in 2026\n", "1,2,3\n4,5,6\n"]
)
def test_a_text_that_lists_no_images_is_not_named(tmp_path: Path, text: str) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.new("RGB", (40, 40), (50 * number, 9, 9)).save(
                tmp_path / label / f"{number}.png"
            )
    (tmp_path / "notes.txt").write_text(text, encoding="utf-8")
    assert not [note for note in open_folder(tmp_path).notes if "lists the images" in note]


# What label tools write for a.png (cat), b.png and d.png (dog), and the name of the file.
TOOLS: dict[str, tuple[str, str]] = {
    "Label Studio, CSV": (
        "project-1-at-2026-11-01.csv",
        "image,id,choice,annotator,lead_time\n/data/upload/1/0a1b2c3d-a.png,1,cat,1,3.2\n"
        "/data/upload/1/4a1b2c3d-b.png,2,dog,1,3.2\n/data/local-files/?d=x%20y/d.png,3,dog,1,3.2\n",
    ),
    "Label Studio, short JSON": (
        "project-1.json",
        json.dumps([
            {"image": "/data/upload/1/0a1b2c3d-a.png", "id": 1, "choice": "cat", "annotator": 1},
            {"image": "/data/upload/1/4a1b2c3d-b.png", "id": 2, "choice": "dog", "annotator": 1},
            {"image": "/data/upload/1/5a1b2c3d-d.png", "id": 3, "choice": {"choices": ["dog"]}},
        ]),
    ),
    "Label Studio, JSON": (
        "project-1.json",
        json.dumps([
            {"id": 1, "data": {"image": f"/data/upload/1/0a1b2c3d-{name}.png"}, "annotations": [
                {"result": [{"value": {"choices": [label]}, "type": "choices"}]}
            ]}
            for name, label in (("a", "cat"), ("b", "dog"), ("d", "dog"))
        ]),
    ),
    "further columns": (
        "labels.csv",
        "file,classes,annotator,seconds\na.png,cat,a,3\nb.png,dog,a,3\nd.png,dog,a,3\n",
    ),
    "no heading": ("labels.csv", "a.png,cat\nb.png,dog\nd.png,dog\n"),
    "paths of another machine": (
        "labels.csv",
        "filename,label\nC:\\photos\\a.png,cat\n/home/me/b.png,dog\nall/d.png,dog\n",
    ),
    # Of these, the columns are made as the error says; the names stay as the tool writes them.
    "VIA": ("labels.csv", "file,classes\na.png,cat\nb.png,dog\nd.png,dog\n"),
    "CVAT": ("labels.csv", "file,classes\nimages/train/a.png,cat\nimages/b.png,dog\nd,dog\n"),
    "makesense": ("labels.csv", "file,classes\na.png,cat\nb.png,dog\nd.png,dog\n"),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_the_exports_of_label_tools_are_read(folder: Path, tool: str) -> None:
    shutil.rmtree(folder / "sub")
    name, text = TOOLS[tool]
    (folder / name).write_text(text)
    assert rows(folder) == {"a.png": [1, 0], "b.png": [0, 1], "d.png": [0, 1]}
    notes = check_data(folder).notes
    assert any("these columns are left out: annotator, seconds" in note for note in notes) == (
        tool == "further columns"
    )


def test_a_name_elsewhere_that_two_images_have_is_not_guessed(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sub" / "a.png")
    with pytest.raises(DataError, match=r"line 2: '/x/a\.png' is not the path of an image"):
        open_folder(write(folder, "file,classes\n/x/a.png,cat\nb.png,dog\n"))


HEADINGS = (
    "file classes",
    "filename label",
    "id species",
    "path class group",
    "image_name y date",
)


def draw_table(root: Path, random: Random) -> str:
    """Write images and a table with some of them: without suffixes, twice, or with several classes.

    Returns the name of the table, and its headings.
    """
    images = [jpeg(number, (8, 6)) for number in range(16)]
    folder = random.choice(("", "photos", "img"))
    files = [f"{random.choice('ab')}{number}.jpg" for number in range(random.randint(6, 15))]
    (root / folder).mkdir(parents=True)
    for number, file in enumerate(files):
        (root / folder / file).write_bytes(images[number])

    columns = random.choice(HEADINGS).split() + random.choice(([], [], ["split"]))
    separator = random.choice((",", ",", ";", "\t"))
    classes = random.sample(
        ("cat", "dog", "fox", "1", "2", "cat|dog", ""), random.randint(2, 5)
    )
    gone = ["gone.jpg"] if random.random() < 0.2 else []
    has_suffix, has_folder = random.random() < 0.7, random.random() < 0.5
    rows = [separator.join(columns)]
    for file in random.sample([*files, *gone], random.randint(4, len(files))):
        named = file if has_suffix else file.partition(".")[0]
        row = [f"{folder}/{named}" if folder and has_folder else named, random.choice(classes)]
        row += [str(random.randint(1, 3)) for _ in columns[2:]]
        if columns[-1] == "split":
            row[-1] = random.choice(("train", "train", "train", "val", "test"))
        rows += [separator.join(row)] * (2 if random.random() < 0.03 else 1)
    name = random.choice(("labels.csv", "labels.csv", "train.csv"))
    (root / name).write_text("\n".join(rows), encoding="utf-8")
    return f"{name} {rows[0]!r}"


def test_drawn_tables_are_read_as_their_golden_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.chdir(tmp_path)  # whose name may have to be quoted in a command
    check_golden("photos/tables", describe_drawn(draw_table), pytestconfig)
