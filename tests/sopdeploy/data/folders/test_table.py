"""`labels.csv`: images with any number of classes, their split, and one line for everything that is wrong."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sopdeploy.data.folders import cells
from sopdeploy.data.folders.check import check_data
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.folders.questions import QuestionError
from sopdeploy.data.photos.copies import group_photographs
from sopdeploy.data.photos.split import choose_held_out, divide
from sopdeploy.errors import DataError
from tests.support.counted import counted
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
        with pytest.raises(DataError, match=r"line 3: .* line 2"):
            open_folder(write(folder, f"file,classes\n{pair[0]},cat\n{pair[1]},dog\n"))


def test_a_backslash_in_a_file_name_is_read_as_it_is(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sub\\c.png")
    assert list(rows(write(folder, "file,classes\nsub\\c.png,cat\nsub/c.png,dog\n"))) == [
        "sub\\c.png",
        "sub/c.png",
    ]


def test_classes_of_a_table_that_are_easily_confused_are_named(folder: Path) -> None:
    table = "file,classes\na.png,Hat\nb.png,hat\nsub/c.png,red  cat\nd.png,red cat\n"
    notes = check_data(write(folder, table)).notes

    assert all(note.startswith(f"{folder}/labels.csv: ") for note in notes)
    confused = [re.findall("'(.*?)'", note) for note in notes]
    assert confused[:2] == [["Hat", "hat"], ["red  cat", "red cat"]]
    with pytest.raises(DataError, match="'Hat'"):
        open_evaluation_images(folder, ("hat", "red cat", "red  cat"), multi_label=True)


PROBLEMS = {
    "file,classes\n": "no images",
    "file,classes\na.png,cat|dog\na.png,dog\n": "line 3: a.png .*line 2",
    "file,classes\na.png,cat|dog\nx.png,cat\ny.png,\nz.png,\n": "line 3: x.png .*2 more",
    "file,classes\n..\\a.png,cat\n": r"line 2: .*a\.png",
    "file,classes\n../a.png,cat\n": r"line 2: '\.\./a\.png'",
    "file,classes\nsub,cat\n": "line 2: 'sub'",
    "file,classes\na.png,cat||dog\n": r"line 2: 'cat\|\|dog'",
    "file,classes\na.png,cat,dog\n": "line 2: .*2 columns",
    "file,classes\na.png,cat\nb.png,\n": r"two classes \(cat\)",
    "file,classes,split\na.png,cat|dog,test\n": "line 2: split is 'test'",
    "file,classes,split\na.png,cat|dog,train\n": "split val",
    "file,classes,split\na.png,cat,train\nb.png,dog,val\n": "of dog",
    GOOD: "add images of cat",
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_an_invalid_table_is_rejected_in_one_line(folder: Path, text: str) -> None:
    path = write(folder, text)

    with pytest.raises(DataError, match=f"{path}(/labels.csv)?: .*{PROBLEMS[text]}") as caught:
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
        with pytest.raises(DataError, match=rf"labels\.csv: .*{problem}"):
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


# What is at the place of `labels.csv` beside class folders, and the word for it in the error
NO_TABLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "empty"),
    "blank": (lambda path: path.write_text("\ufeff \n\n", "utf-8"), "empty"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), os.strerror(errno.ENOENT)),
    "a link to itself": (lambda path: path.symlink_to(path.name), os.strerror(errno.ELOOP)),
    "UTF-16 without a mark": (lambda path: path.write_text(GOOD, "utf-16-le"), "UTF-8"),
    "half a character": (lambda path: path.write_bytes(b"\xff\xfef"), "write a CSV"),
    "no text": (lambda path: path.write_bytes(bytes(range(255, 0, -1))), "write a CSV"),
}


@pytest.mark.parametrize(("make", "word"), NO_TABLES.values(), ids=NO_TABLES)
def test_a_table_that_cannot_be_read_is_never_ignored(folder: Path, make, word: str) -> None:
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
        with pytest.raises(DataError, match=rf"labels\.csv: .*{word}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_table_without_end_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MAX_TABLE_BYTES", len(GOOD) - 1)
    with pytest.raises(DataError, match=r"labels\.csv: .*\d+ bytes"):
        open_folder(write(folder, GOOD))


def test_networks_reject_tables_of_other_classes_and_the_other_kind_of_data(
    folder: Path,
) -> None:
    with pytest.raises(DataError, match=r"line 2: .*several"):
        open_evaluation_images(write(folder, GOOD), ("cat", "dog"))
    with pytest.raises(DataError, match="dog are not"):
        open_evaluation_images(folder, ("cat", "cow"), multi_label=True)
    with pytest.raises(DataError, match=r"sub: .*labels\.csv"):
        open_evaluation_images(folder / "sub", ("cat", "dog"), multi_label=True)


def test_a_table_of_other_columns_next_to_class_folders_is_an_error(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for name in ("a.png", "d.png"):
            shutil.copy(folder / name, folder / label / name)
    shutil.rmtree(folder / "sub")

    with pytest.raises(DataError, match=r"name, breed"):
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

    [note] = found["notes"]
    assert note.endswith(f"labels.csv: 1 image: {folder / 'd.png'}")
    assert "sub/c.png: " in found["unreadable"][0]
    assert "cat: " in found["too_few"][0]


def test_a_name_of_two_images_needs_its_folder(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sub" / "a.png")

    with pytest.raises(DataError, match=r"line 2: 'a'"):
        open_folder(write(folder, "file,classes\na,cat\nb,dog\n"))
    assert rows(write(folder, "file,classes\na.png,cat\nb,dog\n")) == {
        "a.png": [1, 0],
        "b.png": [0, 1],
    }


CATS = {f"{number}.png": ("Cat", "dog")[number % 2] for number in range(6)}
# CSV files beside images without class folders, and their column of classes in the first command of the
# question; None if the table is read without one
BESIDE: dict[str, tuple[str, list[str], str | None]] = {
    "a usual heading": ("metadata.csv", ["file_name,label", *(f"{n},{c}" for n, c in CATS.items())], None),
    "two columns": ("list.tsv", ["name\twhat", *(f"{n}\t{c}" for n, c in CATS.items())], None),
    "IDs": ("train.csv", ["id_code,diagnosis", *(f"{n[0]},{c}" for n, c in CATS.items())], None),
    "one column of few values": (
        "HAM.csv", ["image_id,dx,age", *(f"{n},{c},{n[0]}.5" for n, c in CATS.items())], None
    ),
    "makesense": ("labels_x.csv", [f'{n},"[{c}]"' for n, c in CATS.items()], None),
    "several columns": (
        "HAM.csv", ["image_id,sex,dx", *(f"{n},{'fm'[int(n[0]) // 3]},{c}" for n, c in CATS.items())], "sex"
    ),
    "a column per class": (
        "_classes.csv", ["filename, Cat, dog", *(f"{n}, {c == 'Cat':d}, {c == 'dog':d}" for n, c in CATS.items())], ""
    ),
    "an image is missing": ("x.csv", ["file,label", *(f"{n},{c}" for n, c in [*CATS.items()][1:])], ""),
}  # fmt: skip


def write_beside(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    for number, image in enumerate(CATS):
        Image.new("RGB", (40, 40), (9 * number, 9, 9)).save(folder / image)
    return folder


@pytest.mark.parametrize("case", BESIDE)
def test_a_table_that_lists_all_images_is_read_and_others_are_proposed(
    tmp_path: Path, case: str
) -> None:
    name, lines, column = BESIDE[case]
    root = write_beside(tmp_path / "photos", name, lines)
    if column is None:
        assert open_folder(root).train.labels == ("Cat", "dog")
        assert len(open_evaluation_images(root, ("Cat", "dog"))) == 6
        return

    with pytest.raises(QuestionError) as caught:
        open_folder(root)
    setting = f"{name}:{column}".rstrip(":")
    assert caught.value.lists["readings"][0].endswith(f" --set data.classes_from={setting}")
    assert len(open_folder(root, setting).train.labels) == 2


def test_a_table_of_the_training_part_is_read(tmp_path: Path) -> None:
    lines = ["id,label", *(f"{name[0]},{label}" for name, label in CATS.items())]
    write_beside(tmp_path / "train", "x.md", [])
    (tmp_path / "test").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "test" / "x.png")
    (tmp_path / "train.csv").write_text("\n".join(lines), encoding="utf-8")

    split = open_folder(tmp_path)

    assert split.train.targets.tolist() == [0, 1] * 3
    assert any("train.csv: 1 image" in note for note in split.notes)


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_each_part_may_have_a_table_of_the_same_name(tmp_path: Path, name: str) -> None:
    lines = ["file,label", *(f"{image},{label}" for image, label in CATS.items())]
    for part in ("train", "valid"):
        write_beside(tmp_path / part, name, lines)
    said = "" if name == "labels.csv" else name

    split = open_folder(tmp_path, said)
    images = open_evaluation_images(tmp_path, ("Cat", "dog"), reading=split.reading)

    assert [len(split.train), len(split.held_out), len(images)] == [6, 6, 6]
    (tmp_path / "valid" / name).unlink()
    with pytest.raises(DataError, match=f"valid.*{name}"):
        open_folder(tmp_path, said)


# Whether a table that gives the rows of `CATS` in each folder these classes leaves the folders the classes
CLASS_COLUMNS = {
    "other classes": ("{label}/{name},{letter}", 12, False),
    "the same classes": ("{label}/{name},{label}", 12, True),
    "other names of the same classes": ("{label}/{name},a {label}", 12, True),
    "not all images": ("{label}/{name},{letter}", 11, True),
}


@pytest.mark.parametrize(("row", "count", "is_read"), CLASS_COLUMNS.values(), ids=CLASS_COLUMNS)
def test_a_table_beside_class_folders_is_asked_about_if_it_has_other_classes_for_all_images(
    tmp_path: Path, row: str, count: int, is_read: bool
) -> None:
    for label in ("cat", "dog"):
        write_beside(tmp_path / label, "x.md", [])
    rows = [
        row.format(label=label, name=name, letter="ab"[n % 2])
        for label in ("cat", "dog")
        for n, name in enumerate(CATS)
    ]
    table = "\n".join(["path,class_id", *rows[:count]])
    (tmp_path / "other.csv").write_text(table, encoding="utf-8")

    if is_read:
        split = open_folder(tmp_path)
        assert split.train.labels == ("cat", "dog")
        assert any("other.csv:class_id" in note for note in split.notes)
    else:
        with pytest.raises(QuestionError) as caught:
            open_folder(tmp_path)
        assert caught.value.lists["readings"][0].endswith("classes_from=other.csv:class_id")
    labels = open_folder(tmp_path, "other.csv:class_id").train.labels
    assert len(labels) == 2


@pytest.mark.parametrize("name", ["annotations.json", "annotations.xml", "list.txt"])
def test_a_file_that_is_not_a_csv_file_is_refused_with_advice(
    tmp_path: Path, name: str
) -> None:
    root = write_beside(tmp_path / "photos", name, [])
    with pytest.raises(DataError, match=f"{name}: .*CSV"):
        open_folder(root, name)


# What label tools write for a.png (cat), b.png and d.png (dog), and the name of the file.
TOOLS: dict[str, tuple[str, str]] = {
    "Label Studio, CSV": (
        "project-1-at-2026-11-01.csv",
        "image,id,choice,annotator,lead_time\n/data/upload/1/0a1b2c3d-a.png,1,cat,1,3.2\n"
        "/data/upload/1/4a1b2c3d-b.png,2,dog,1,3.2\n/data/local-files/?d=x%20y/d.png,3,dog,1,3.2\n",
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
    "makesense": ("labels.csv", 'a.png,"[cat]"\nb.png,"[dog]"\nd.png,"[dog]"\n'),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_the_exports_of_label_tools_are_read(folder: Path, tool: str) -> None:
    shutil.rmtree(folder / "sub")
    name, text = TOOLS[tool]
    (folder / name).write_text(text)

    assert rows(folder) == {"a.png": [1, 0], "b.png": [0, 1], "d.png": [0, 1]}

    notes = check_data(folder).notes
    assert any("annotator, seconds" in note for note in notes) == (tool == "further columns")


def test_a_name_elsewhere_that_two_images_have_is_not_guessed(folder: Path) -> None:
    shutil.copy(folder / "a.png", folder / "sub" / "a.png")
    with pytest.raises(DataError, match=r"line 2: '/x/a\.png'"):
        open_folder(write(folder, "file,classes\n/x/a.png,cat\nb.png,dog\n"))
