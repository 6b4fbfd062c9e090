"""Folders with one subfolder per class: what people's folders look like, splits, and errors with advice."""

import json
import os
import re
from pathlib import Path
from zlib import crc32

import pytest
from typer.testing import CliRunner

from sopdeploy.data.folders.check import check_data
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.folders.questions import QuestionError
from sopdeploy.data.photos.copies import group_photographs
from sopdeploy.data.photos.parts import FOLDERS
from sopdeploy.data.photos.photo import Split
from sopdeploy.data.photos.split import choose_held_out, divide
from sopdeploy.data.sources import FolderConfig, open_data
from sopdeploy.errors import ConfigError, DataError
from sopdeploy_commands.app import app
from tests.support.small_data import jpeg, write_classes


def paint(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    endings = {"jpg": "JPEG"}
    ending = path.suffix[1:]
    path.write_bytes(jpeg(seed, (32, 24), endings.get(ending, ending)))


def make(root: Path, **counts: int) -> Path:
    """Make a folder with so many images per class, all different; `__` in a name is a slash."""
    for name, count in counts.items():
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True)
        for number in range(count):
            paint(folder / f"{number:03}.jpg", crc32(f"{name} {number}".encode()))
    return root


def names(images) -> list[str]:
    return [os.fsdecode(path) for path in images.paths]


def open_at(path: Path, hold_out: float = 0.2, seed: int = 0):
    return hold_out_images(open_folder(path), hold_out, seed)


def hold_out_images(split: Split, hold_out: float, seed: int) -> Split:
    if len(split.held_out):
        return split
    return divide(
        split,
        choose_held_out(split.train, group_photographs(split.train).groups, hold_out, seed),
    )


def test_classes_are_sorted_and_hidden_and_other_files_ignored(tmp_path) -> None:
    make(tmp_path, zebra=5, ant=5, Bee=5)
    for hidden in (
        ".ipynb_checkpoints",
        "ant/.trash",
        "__MACOSX",
        "@eaDir",
        "lost+found",
        "ant/@eaDir",
    ):
        paint(tmp_path / hidden / "copy.png")
    paint(tmp_path / "ant" / ".hidden.png")
    (tmp_path / "ant" / "notes.txt").write_text("six legs")
    (tmp_path / "Bee" / "scan.TIF").write_bytes(b"II*")
    (tmp_path / "README").write_text("mine")
    split = open_at(tmp_path)
    lines = open_folder(tmp_path).notes
    formats = "JPEG, PNG, WebP, GIF, BMP, AVIF and HEIC"
    skipped = ".tif 1, without an ending 1, .txt 1"

    assert lines[-1] == f"{tmp_path}: 3 files skipped, not {formats}: {skipped}"
    assert split.train.labels == split.held_out.labels == ("Bee", "ant", "zebra")
    assert len(split.train) + len(split.held_out) == 15


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path) -> None:
    make(tmp_path / "elsewhere", c=3, more=2)
    root = make(tmp_path / "photos", a=2, b=2)
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "a" / "circle").symlink_to("..")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(root / "a")
    split = hold_out_images(open_folder(root, FOLDERS), 0.2, 0)
    found = {
        Path(name).parent.as_posix() for name in names(split.train) + names(split.held_out)
    }

    assert found == {"a", "a/more", "b", "c"}


def test_a_class_of_one_image_is_left_out_with_a_line(tmp_path) -> None:
    split = open_folder(make(tmp_path, a=3, b=1, c=3))
    assert split.train.labels == ("a", "c")
    assert names(split.train) == [
        f"{label}/00{number}.jpg" for label in "ac" for number in range(3)
    ]

    [note] = split.notes
    assert note.startswith(f"{tmp_path}: ")
    assert ": b;" in note


COMPOSED, DECOMPOSED = "\u00c4pfel", "A\u0308pfel"  # as Linux and macOS write the name


def test_folders_whose_names_differ_only_in_their_encoding_are_one_class(tmp_path) -> None:
    split = open_folder(make(tmp_path / "photos", **{COMPOSED: 3, DECOMPOSED: 2, "Birne": 2}))
    assert split.train.labels == ("Birne", COMPOSED)
    assert split.train.class_counts().tolist() == [2, 5]
    assert split.notes == ()

    parts = {f"train__{COMPOSED}": 2, "train__b": 2, f"val__{DECOMPOSED}": 2, "val__b": 1}
    parts = open_folder(make(tmp_path / "parts", **parts))
    assert parts.train.labels == parts.held_out.labels == ("b", COMPOSED)

    images = open_evaluation_images(tmp_path / "photos", (DECOMPOSED, "Birne"))
    assert images.labels == (DECOMPOSED, "Birne")
    assert images.class_counts().tolist() == [5, 2]


def quoted(note: str) -> list[str]:
    """List the names of classes that *note* has in quotes."""
    return re.findall("'(.*?)'", note)


@pytest.mark.slow
def test_the_images_of_a_split_do_not_depend_on_encodings(tmp_path) -> None:
    held_out = [
        {
            Path(name).name
            for name in names(open_at(make(tmp_path / str(place), **folders)).held_out)
        }
        for place, folders in enumerate(({COMPOSED: 20, "b": 20}, {DECOMPOSED: 20, "b": 20}))
    ]
    assert held_out[0] == held_out[1]


def test_spaces_around_the_name_of_a_folder_are_part_of_its_class(tmp_path) -> None:
    split = open_folder(make(tmp_path, **{"hat ": 2, "hat": 2, " b": 2, "c d": 2}))

    assert split.train.labels == (" b", "c d", "hat", "hat ")
    alike, spaced = split.notes
    assert quoted(alike) == ["hat", "hat "]
    assert quoted(spaced) == [" b", "hat "]


@pytest.mark.parametrize(
    ("leave_out", "names", "labels"),
    [
        ("temp", ["temp"], ("cat", "cat ")),
        ("temp ", ["temp "], ("cat", "cat ")),
        (" cat , temp", ["temp", " cat "], ("cat", "cat ")),
        ("cat ", [], ("cat",)),
        ("cat", [], ("cat ",)),
    ],
)
def test_the_folder_that_is_named_is_left_out_and_recorded(
    tmp_path, leave_out, names, labels
) -> None:
    labels = (*labels, "dog")
    root = make(tmp_path, **dict.fromkeys(["cat", "cat ", "dog", *names], 3))

    split = open_folder(root, FOLDERS, leave_out=leave_out)
    images = open_evaluation_images(root, labels, reading=split.reading)

    assert split.train.labels == labels
    assert images.class_counts().tolist() == [3] * len(labels)


@pytest.mark.parametrize("other", ["Hat", "HAT", "\N{FULLWIDTH LATIN SMALL LETTER H}at"])
def test_classes_that_are_easily_confused_are_named(tmp_path, other) -> None:
    one, two = sorted([other, "hat"])
    pair = f"{one!r} and {two!r}"
    split = open_folder(make(tmp_path / "photos", **{other: 2, "hat": 2, "b": 2}))
    [note] = split.notes

    assert note.startswith(f"{tmp_path}/photos: {pair} ")

    make(
        tmp_path / "parts", **{f"train__{other}": 2, "train__b": 2, "val__hat": 2, "val__b": 1}
    )
    with pytest.raises(DataError) as problem:
        open_folder(tmp_path / "parts")

    path = tmp_path / "parts" / "val" / "hat"
    wrong, command = problem.value.lists["problems"]
    assert wrong.startswith(f"{path}: ")
    assert repr(other) in wrong
    assert command.endswith(" --set data.leave_out=val")
    with pytest.raises(DataError) as problem:
        open_evaluation_images(tmp_path / "photos", ("b", "hat"))
    assert pair in str(problem.value)

    make(tmp_path / "parts" / "val", hAT=1)
    (tmp_path / "parts" / "val" / "hat").rename(tmp_path / "parts" / "val" / "haT")
    with pytest.raises(DataError) as problem:
        open_folder(tmp_path / "parts")
    assert str(problem.value).count(repr(other)) == 2

    lines: list[str] = []
    open_evaluation_images(
        tmp_path / "photos", ("b", "hat"), other_classes=True, log=lines.append
    )

    assert pair in lines[0]


@pytest.mark.slow
def test_a_split_depends_on_the_names_and_its_own_seed_only(tmp_path) -> None:
    split = open_at(make(tmp_path / "x", a=20, b=20))
    held = names(split.held_out)

    assert names(open_at(tmp_path / "x").held_out) == held
    assert names(open_at(make(tmp_path / "y", b=20, a=20)).held_out) == held
    assert names(open_at(tmp_path / "x", seed=1).held_out) != held
    assert len(open_at(tmp_path / "x", hold_out=0.5).held_out) > 2 * len(held)
    assert not set(held) & set(names(split.train))


# The images of each folder, and what the error names
BAD_FOLDERS: dict[str, tuple[dict[str, int], str]] = {
    "nothing": ({}, "it is empty"),
    "one class": ({"a": 3}, "a/ 3 images"),
    "one image of each class": ({"a": 1, "b": 1}, "add images of a, b"),
    "one image of a class": ({"a": 3, "b": 1}, "add images of b"),
    "an empty part": ({"train": 0}, "it is empty"),
    "another case": ({"train__a": 2, "train__b": 2, "val__a": 1, "val__B": 1}, "is it 'b'?"),
    "two classes more": (
        {"train__a": 2, "train__b": 2, "val__a": 1, "val__b": 1, "val__c": 1, "val__d": 1},
        "val/c: ",
    ),
    "no training part": ({"val__a": 2, "val__b": 2}, "no train"),
    "two training parts": ({"train__a": 2, "Training__a": 2}, "Training, train"),
}


@pytest.mark.parametrize(("counts", "said"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_an_unusable_folder_is_named_with_advice(tmp_path, counts, said) -> None:
    make(tmp_path, **counts)

    with pytest.raises(DataError) as problem:
        open_at(tmp_path)
    assert said in str(problem.value)
    assert str(tmp_path) in str(problem.value)
    assert "\n" not in str(problem.value)

    # A dry run says no to what `train` says no to.
    with pytest.raises(DataError):
        check_data(tmp_path).must_be_usable()


def test_a_missing_or_unreadable_folder_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"nowhere: .*one subfolder"):
        open_at(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"^data\.path: "):
        open_data(FolderConfig(kind="folder"))

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be listed"):
        open_at(tmp_path)


PETS = {"cats": 3, "dogs": 3}


def below(*parts: str) -> dict[str, int]:
    """So many images of every pet, below each of the folders *parts*."""
    return {
        f"{part.replace('/', '__')}__{name}": count
        for part in parts
        for name, count in PETS.items()
    }


def open_logged(path: Path) -> tuple[Split, str]:
    split = open_folder(path)
    return split, "\n".join(split.notes)


LAYOUTS = [
    below("Training", "Validation"),
    below("Train", "Val"),
    below("seg_train/seg_train", "seg_test/seg_test"),
    below("train-images", "dev"),
    below("trainset", "testset"),
    below("asl_alphabet_train/asl_alphabet_train", "asl_alphabet_test/asl_alphabet_test"),
    below("cars_train", "cars_test"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_usual_names_of_parts_are_recognized_in_any_case(tmp_path, layout) -> None:
    path = make(tmp_path / "photos", **layout)
    split, log = open_logged(path)
    assert split.train.labels == ("cats", "dogs")
    assert len(split.train) == 6
    assert len(split.held_out) == 6
    assert log == ""
    assert [part.count for part in check_data(path).parts] == [6, 6]

    used: list[str] = []
    assert len(open_evaluation_images(path, ("cats", "dogs"), log=used.append)) == 6
    assert "this folder" in used[0]


UNCLEAR = [
    (
        below("train", "val", "test") | {"extra__new": 2},
        (6, 6),
        "training uses train and val only, not extra, test",
    ),
    (below("train"), (6, 0), ""),
]


@pytest.mark.parametrize(
    ("counts", "sizes", "line"), UNCLEAR, ids=[line[:20] for *_, line in UNCLEAR]
)
def test_folders_that_may_be_a_mistake_are_named(tmp_path, counts, sizes, line) -> None:
    split, log = open_logged(make(tmp_path, **counts))

    assert (len(split.train), len(split.held_out)) == sizes
    assert line in log
    assert log.count("\n") == 0


@pytest.mark.parametrize(
    ("classes", "shape"),
    [(["cat", "dog", "cat", "dog"], (3,)), (["cat", "dog", "cat|dog", "dog"], (3, 2))],
    ids=["one class each", "several classes"],
)
def test_a_table_with_one_class_per_image_predicts_one(tmp_path, classes, shape) -> None:
    make(tmp_path, images=4)
    lines = [f"images/{number:03}.jpg,{name}" for number, name in enumerate(classes)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,classes", *lines]))
    split, log = open_logged(tmp_path)

    assert split.train.labels == ("cat", "dog")
    assert split.train.targets.ndim == len(shape)
    assert ("predicts one" in log) == (len(shape) == 1)
    if len(shape) == 1:
        found = open_evaluation_images(tmp_path, ("dog", "cat"))
        assert [found.labels[target] for target in found.targets] == classes
        assert check_data(tmp_path).parts[0].classes == {"cat": 2, "dog": 2}


def test_forty_broken_files_are_ten_and_a_number_and_one_reason(tmp_path) -> None:
    folder = write_classes(tmp_path / "photos", ("a", "b"), 30)
    for file in sorted(folder.rglob("*.jpg"))[:40]:
        file.write_bytes(b"no image")
    command = [
        "train",
        "--recipe",
        "digits-plain",
        "--set",
        "data.kind=folder",
        "--data",
        str(folder),
    ]
    shown = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run"), "--json"])

    assert shown.exit_code == 2
    assert "40 images" in shown.stderr
    assert (shown.stderr.count(".jpg"), shown.stderr.count("not an image")) == (10, 1)
    assert re.search(r"not an image.*\.jpg.* 30 more", shown.stderr)  # the reason comes first
    assert len(json.loads(shown.stdout)["error"]["lists"]["images"]) == 40

    checked = CliRunner().invoke(app, ["train", "--dry-run", "--data", str(folder)])
    assert (checked.stderr.count(".jpg"), checked.stderr.count("not an image")) == (10, 1)
    assert re.search(r"not an image.* 30 more", checked.stderr)


TABLES = {
    "file,classes": ",", "filename,label": ",", "file;classes": ";", "sep=;\nfile;classes": ";",
    "sep=;": ";",
    "image\tlabel": "\t", '"sep=,"\r\nPath,Class': ",",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("heading", "separator"), TABLES.items())
def test_a_table_above_folders_that_are_not_classes_tells_the_classes(
    tmp_path, heading: str, separator: str, encoding: str
) -> None:
    make(tmp_path, **{"2026-01": 3, "2026-02": 3})
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.jpg"))
    rows = [
        separator.join((file, ("h\u00fcte", "kleid")[place % 2]))
        for place, file in enumerate(files)
    ]
    (tmp_path / "labels.csv").write_bytes("\n".join([heading, *rows]).encode(encoding))
    split = open_folder(tmp_path)

    assert split.train.labels == ("h\u00fcte", "kleid")
    assert split.train.class_counts().tolist() == [3, 3]


def test_an_image_of_a_table_has_the_names_of_all_its_classes(tmp_path) -> None:
    make(tmp_path, **{"2026-01": 2, "2026-02": 2})
    rows = [
        "2026-01/000.jpg,hat",
        "2026-01/001.jpg,hat|tie",
        "2026-02/000.jpg,",
        "2026-02/001.jpg,tie",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file,classes", *rows]))
    images = open_folder(tmp_path).train
    named = [images.class_names(index) for index in range(len(images))]

    assert named == [["hat"], ["hat", "tie"], [], ["tie"]]


@pytest.mark.parametrize("name", ["labels.tsv", "Labels.csv", "labels.txt", "labels.json"])
def test_a_text_called_labels_that_lists_no_image_changes_nothing(tmp_path, name) -> None:
    make(tmp_path, tulip=3, rose=3)
    (tmp_path / name).write_text("classes = ['tulip', 'rose']\n")

    assert open_folder(tmp_path).train.labels == ("rose", "tulip")


def test_bundles_and_runs_are_never_classes(tmp_path) -> None:
    make(tmp_path, cat=3, dog=3)
    run = tmp_path / "photos-1"
    bundle = tmp_path / "photos-3f6c01d2a4b7"
    for folder, files in (
        (run, ("best.pt", "last.pt")),
        (bundle, ("manifest.json", "model.onnx")),
    ):
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes(b"x")
        paint(folder / "worst" / "1.jpg")  # whatever they hold
        paint(folder / "2.jpg")
    (tmp_path / "latest").symlink_to(run.name)
    # Also below folders that hold them
    for name, output in (("runs", run), ("bundles", bundle)):
        (tmp_path / name).mkdir()
        (tmp_path / name / output.name).symlink_to(output)
        (tmp_path / name / "latest").symlink_to(output.name)
    opened = open_folder(tmp_path)

    assert opened.train.labels == ("cat", "dog")

    (note,) = opened.notes
    names = "bundles, latest, photos-1, photos-3f6c01d2a4b7, runs"
    assert note.endswith(f": {names}")
    assert {part.name: [*part.classes] for part in check_data(tmp_path).parts} == {
        "all": ["cat", "dog"]
    }


@pytest.mark.parametrize("out", ["run", "cat/run", "../photos/runs/run"])
def test_a_run_is_not_written_into_its_photographs(tmp_path, out) -> None:
    photos = make(tmp_path / "photos", cat=3, dog=3)
    result = CliRunner().invoke(
        app, ["train", "--data", str(photos), "--out", str(photos / out)]
    )

    assert result.exit_code == 2
    assert str(photos) in result.stderr
    assert sorted(path.name for path in photos.iterdir()) == ["cat", "dog"]


def test_runs_of_a_folder_that_is_the_current_one_are_written_elsewhere(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(make(tmp_path / "photos", cat=3, dog=3))
    result = CliRunner().invoke(app, ["train", "--data", "."])

    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: --out: runs ")


def test_classes_in_names_of_files_that_are_easily_confused_are_named(tmp_path) -> None:
    for number, name in enumerate(("Hat_1", "Hat_2", "hat_3", "hat_4", "bag_5", "bag_6")):
        paint(tmp_path / f"{name}.jpg", number)

    notes = open_folder(tmp_path, r"^[A-Za-z]+").notes
    assert ["Hat", "hat"] in map(quoted, notes)


@pytest.mark.parametrize("test", ["test", "test1"])
def test_classes_in_the_names_of_training_images_are_read_on_demand(tmp_path, test) -> None:
    for number in range(4):
        for label in ("cat", "dog"):
            name = f"{label}.{number}"
            paint(tmp_path / "train" / f"{name}.jpg", crc32(name.encode()))
        paint(tmp_path / test / f"{number}.jpg", number)

    with pytest.raises(QuestionError, match=r"data\.classes_from='\^\\D\+'"):
        open_folder(tmp_path)

    split = open_folder(tmp_path, r"^\D+")
    assert split.train.labels == ("cat", "dog")
    assert len(split.train) == 8
    assert len(split.held_out) == 0
    assert split.notes[0].startswith(f"{tmp_path}/{test}: ")
    assert "4 images" in split.notes[0]


def test_an_archive_beside_a_few_images_is_to_be_unpacked(tmp_path) -> None:
    root = make(tmp_path, screenshots=2)
    (root / "with_mask.part1.rar").write_bytes(b"Rar!")

    with pytest.raises(DataError, match=r"with_mask\.part1"):
        open_folder(root)


RAW = [f"{number}.{suffix}" for number in range(8) for suffix in ("NEF", "xmp")]
WITHOUT_IMAGES = {
    "raw files, their settings and a note": ([*RAW, "notes.txt"], "convert them"),
    "an archive and texts": (["photos.zip", "readme.txt", "license.txt"], "unpack cat/photos.zip"),
    "texts": (["readme.txt", "license.txt"], ""),
    "arrays": (["a.npy", "b.npy"], ""),
}  # fmt: skip


@pytest.mark.parametrize(("files", "advice"), WITHOUT_IMAGES.values(), ids=WITHOUT_IMAGES)
def test_a_folder_is_a_class_if_any_file_may_be_a_photograph(tmp_path, files, advice) -> None:
    root = make(tmp_path, cat=0, dog=3, fox=3)
    for name in files:
        (root / "cat" / name).write_bytes(b"x")

    if advice:
        with pytest.raises(DataError, match=advice):
            open_folder(root)
    else:
        split = open_folder(root)
        assert split.train.labels == ("dog", "fox")
        assert any(note.startswith(f"{root}: ") and "cat" in note for note in split.notes)


UNLABELLED: dict[str, tuple[dict[str, int], str]] = {
    "no folders": ({"test": 3}, "test: .* 3 images.*`sopdeploy"),
    "one other folder": ({"test__unknown": 3}, "test: .* 3 images"),
    "nothing": ({"test": 0}, "test: .*empty"),
    "before one with classes": ({"val": 3, "test__a": 1, "test__b": 1}, "val: "),
}


@pytest.mark.parametrize(("folders", "said"), UNLABELLED.values(), ids=UNLABELLED)
def test_held_out_images_without_classes_are_left_out_in_one_line(
    tmp_path, folders, said
) -> None:
    split = open_folder(make(tmp_path, train__a=2, train__b=2, **folders))
    (note,) = split.notes

    assert len(split.held_out) == (2 if "test__a" in folders else 0)
    assert re.search(said, note)


def test_held_out_images_may_lack_a_class(tmp_path) -> None:
    split = open_folder(make(tmp_path, train__a=2, train__b=2, train__c=2, val__c=1, val__a=2))
    assert split.held_out.labels == split.train.labels
    assert split.held_out.class_counts().tolist() == [2, 0, 1]

    [note] = split.notes
    assert note.startswith(f"{tmp_path}/val: ")
    assert " b," in note


def test_everything_at_the_top_that_is_not_used_is_named(tmp_path) -> None:
    make(tmp_path, cat=3, dog=3)
    make(tmp_path, fox=9)
    paint(tmp_path / "bird.jpg", 1)
    (tmp_path / "manual.pdf").write_bytes(b"%PDF-1.4")
    beside, skipped = open_folder(tmp_path).notes

    assert beside.startswith(f"{tmp_path}: 1 image ")
    assert beside.endswith(": bird.jpg")
    assert skipped.endswith(": .pdf 1")


@pytest.mark.parametrize(
    "name", ["0.jpg_original", "0.jpg~", "0.jpg.bak", "0.jpg (copy)", "video.THM", "video.thm"]
)
def test_what_programs_leave_beside_a_photograph_is_none(tmp_path, name) -> None:
    make(tmp_path, a=3, b=3)
    for label in ("a", "b"):
        folder = tmp_path / label
        (folder / "0.jpg").write_bytes((folder / "000.jpg").read_bytes())
        (folder / name).write_bytes((folder / "000.jpg").read_bytes())
        (folder / "IMG_7").write_bytes((folder / "001.jpg").read_bytes())  # a photograph

    assert open_folder(tmp_path).train.class_counts().tolist() == [5, 5]


def test_images_without_folders_are_counted_together(tmp_path) -> None:
    for number in range(3):
        paint(tmp_path / f"{number}.jpg", number)
    with pytest.raises(DataError, match=r"labels\.csv \(3 images"):
        open_folder(tmp_path)


UNDECODABLE = [
    ["a/Stra\udcdfe.jpg"],
    ["Stra\udcdfe/0.jpg"],
    ["a/Stra\udcdfe.jpg", "b/gr\udcfcn.jpg"],
]


@pytest.mark.parametrize("names", UNDECODABLE, ids=["file", "folder", "two files"])
def test_all_names_that_are_not_utf8_are_in_one_error(tmp_path, names) -> None:
    make(tmp_path, a=2, b=2)
    try:
        for name in names:
            paint(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")

    with pytest.raises(DataError, match="UTF-8") as caught:
        open_at(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "udcdf" in message

    # Several names are also a list for programs.
    assert caught.value.lists.get("names", []) == (names if len(names) == 2 else [])
