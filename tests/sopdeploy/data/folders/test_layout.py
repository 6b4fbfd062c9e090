"""Which folders are read without a question, which are asked about, and that the commands shown train them.

`public_folders.json` describes 70 folders of public repositories: the names of their folders, a few names of
files in each, and the classes that are right, if there are some. The rules were decided on the first 55,
and confirmed on the others, which were collected afterwards.
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.folders.questions import MAX_COMMANDS, QuestionError, Reading
from sopdeploy.data.sources import FolderConfig, open_data
from sopdeploy.errors import DataError
from sopdeploy.training.settings.recipe_files import parse_override
from tests.support.small_data import jpeg

PUBLIC = json.loads(
    (Path(__file__).parents[3] / "goldens/photos/public_folders.json").read_text("utf-8")
)
IMAGE = jpeg(0, (8, 6))


def make(root: Path, files: Iterable[str]) -> Path:
    """Write *files* in *root*: the same image, which is enough to see what a folder is."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    return root


def four(*folders: str) -> list[str]:
    """Name four images in each of *folders*; `a:{}_mask` also tells the names of the files."""
    split = [folder.partition(":") for folder in folders]
    return [
        f"{where}/{name or '{}'}.jpg".format(n) for where, _, name in split for n in range(4)
    ]


def open_command(command: str):
    """Open the data of a printed command as `train` does."""
    program, name, option, path, *settings = shlex.split(command)
    assert [program, name, option] == ["sopdeploy", "train", "--data"]
    values = dict(parse_override(setting) for setting in settings if setting != "--set")
    given = {key.removeprefix("data."): value for key, value in values.items()}
    return open_data(FolderConfig(kind="folder", path=Path(path), **given))


def ask(root: Path) -> list[tuple[str, ...]]:
    """Return the classes of each command of the question about *root*; each must train what is printed."""
    with pytest.raises(DataError) as caught:
        open_folder(root)

    commands = caught.value.lists.get("readings", [])
    classes = []
    for command in commands:
        train = open_command(command).train
        classes.append(train.labels)
        if isinstance(caught.value, QuestionError):
            counts = zip(train.labels, train.class_counts().tolist(), strict=True)
            shown = ", ".join(f"{label} {count}" for label, count in [*counts][:5])
            assert f"{command} ({shown}" in str(caught.value)
    assert len(commands) <= MAX_COMMANDS
    assert "\n" not in str(caught.value)
    return classes


PARTS = [f"{part}/{name}" for part in ("train", "val") for name in ("cat", "dog")]
READ: dict[str, tuple[list[str], str]] = {
    "class folders": (four("cat", "dog"), "cat dog"),
    "digits": (four("0", "1", "10"), "0 1 10"),
    "WordNet": (four("n01440764", "n01443537"), "n01440764 n01443537"),
    "called classes": (four("Class_1", "Class_2"), "Class_1 Class_2"),
    "words of masks in classes": (four("with_mask", "without_mask"), "with_mask without_mask"),
    "words that others have, too": (four("apple", "green_apple", "pear"), "apple green_apple pear"),
    "parts": (four(*PARTS), "cat dog"),
    "other folders beside parts": (four(*PARTS, "images"), "cat dog"),
    "a test without classes": (four("train/cat", "train/dog", "test"), "cat dog"),
    "a folder called images": (four("images/cat", "images/dog"), "cat dog"),
    "parts in a folder": (four(*(f"dataset/{part}" for part in PARTS)), "cat dog"),
    "an image beside": ([*four("cat", "dog", "owl"), "overview.jpg"], "cat dog owl"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "classes"), READ.values(), ids=READ)
def test_usual_folders_are_read_without_a_question(tmp_path, files, classes) -> None:
    assert " ".join(open_folder(make(tmp_path, files)).train.labels) == classes


ASKED: dict[str, tuple[list[str], str]] = {
    "two depths": (four("raw/cat", "raw/dog", "bikes"), "cat dog"),
    "many images beside": ([*four("cat", "dog"), *(f"{n}.jpg" for n in range(4))], "cat dog"),
    "two levels": (four("a/x", "a/y", "b/x", "b/y"), "x y"),
    "one folder above": (four("birds/owl", "birds/wren"), "owl wren"),
    "deep": (four("a/b/c/cat", "a/b/c/dog"), "cat dog"),
    "parts inside": (four("cat/train", "cat/test", "dog/train", "dog/test"), "cat dog"),
    "forms inside": (four("cat/images", "cat/masks", "dog/images", "dog/masks"), "cat dog"),
    "folds": (four("fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"), "cat dog"),
    "formats": (four("jpg:{}", "segmim:{}"), "jpg segmim"),
    "camel case": (four("JPEGImages", "SegmentationClass"), "JPEGImages SegmentationClass"),
    "a new folder": (four("cat", "dog", "New folder"), "cat dog"),
    "a copy": (four("cat", "dog", "dog - Copy"), "cat dog"),
    "a copy by its number": (four("cat", "dog", "dog (2)"), "cat dog"),
    "a backup": (four("cat", "dog", "backup/cat", "backup/dog"), "cat dog"),
    "the same folders again": (four("no", "yes", "no_v2", "yes_v2"), "no yes"),
    "a part beside classes": (four("cat", "dog", "test_cat"), "cat dog"),
    "classes beside a training part": (four("train/steam", "train/tram", "bus"), "steam tram"),
    "days": (four("day_1", "day_2", "night"), "day_1 day_2 night"),
    "objects in parts": (
        four("train/cat/tom", "train/cat/tim", "train/dog/rex", "val/cat/tam", "val/dog/max"), "cat dog"
    ),
    "dates": (four("2024-05-01", "2024-05-02"), "2024-05-01 2024-05-02"),
    "masks": (four("cat", "cat:{}_mask", "dog", "dog:{}_mask"), "cat dog"),
    "names of files": (four("photos:cat.{}", "photos:dog.{}"), "cat dog"),
    "names of files of a training part": (
        [*four("train:cat.{}", "train:dog.{}"), "test/1.jpg", "test/2.jpg"], "cat dog"
    ),
    "other classes in a part": (four("train/cat", "train/dog", "test/cats", "test/dogs"), "cat dog"),
    "other letters in a part": (four("train/Cat", "train/dog", "test/cat", "test/dog"), "Cat dog"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "classes"), ASKED.values(), ids=ASKED)
def test_other_folders_are_asked_about_with_commands_that_train_them(
    tmp_path, files, classes
) -> None:
    assert tuple(classes.split()) in ask(make(tmp_path, files))


# The classes of the first command, and of another one
FIRST: dict[str, tuple[list[str], str, str]] = {
    "people": (
        four("ann/images/happy", "ann/images/sad", "bob/images/happy", "bob/images/sad"), "happy sad",
        "ann/images/happy ann/images/sad bob/images/happy bob/images/sad",
    ),
    "people with masks": (
        four("ann/images/happy", "ann/masks/happy", "ann/images/sad", "ann/masks/sad",
             "bob/images/happy", "bob/masks/happy", "bob/images/sad", "bob/masks/sad"), "happy sad", "ann bob",
    ),
    "letters of alphabets": (
        four("Greek/character01", "Greek/character02", "Latin/character01"),
        "Greek/character01 Greek/character02 Latin/character01", "character01 character02",
    ),
    "in parts": (
        four(*(f"{part}/{letter}" for part in ("train", "val") for letter in ("A/1", "A/2", "B/1"))),
        "A/1 A/2 B/1", "1 2",
    ),
    "different classes": (four("a/w", "a/x", "b/y", "b/z"), "w x", "w x y z"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "first", "other"), FIRST.values(), ids=FIRST)
def test_the_likeliest_command_is_the_first(tmp_path, files, first, other) -> None:
    classes = [" ".join(labels) for labels in ask(make(tmp_path, files))]
    assert classes[0] == first
    assert other in classes


@pytest.mark.parametrize(("kind", "notes"), [("subfolders", 1), ("paths", 0)])
def test_equal_names_in_several_folders_are_never_joined_silently(
    tmp_path, kind, notes
) -> None:
    root = make(tmp_path, four("Greek/1", "Latin/1", "Latin/2"))
    split = open_folder(root, kind)
    assert len([note for note in split.notes if "Latin" in note]) == notes
    assert split.train.labels == (("1", "2") if notes else ("Greek/1", "Latin/1", "Latin/2"))


def test_masks_are_left_out_by_a_command_of_the_question(tmp_path) -> None:
    root = make(tmp_path, ASKED["masks"][0])
    with pytest.raises(QuestionError) as caught:
        open_folder(root)

    split = open_command(caught.value.lists["readings"][0])
    assert split.train.class_counts().tolist() == [4, 4]


REFUSED = {
    "images without folders": ["1.jpg", "2.jpg"],
    "parts without classes": four("train", "val"),
    "a folder of all images": four("images"),
}


@pytest.mark.parametrize("files", REFUSED.values(), ids=REFUSED)
def test_a_folder_without_anything_to_choose_is_refused_with_its_content(
    tmp_path, files
) -> None:
    assert ask(make(tmp_path, files)) == []


BOXES = {
    "YOLO": "labels/{}.txt",
    "Pascal VOC": "annotations/{}.xml",
    "LabelMe": "images/{}.json",
}


@pytest.mark.parametrize("pattern", [*BOXES.values(), "_annotations.coco.json"])
def test_boxes_are_converted_by_a_program_of_the_field(tmp_path, pattern) -> None:
    root = make(tmp_path, four("images"))
    for number in range(4):
        path = root / pattern.format(number)
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")

    with pytest.raises(DataError, match="`datum convert`"):
        open_folder(root)


def test_predictions_of_a_server_are_not_labels(tmp_path) -> None:
    root = make(tmp_path, four("cat", "dog"))
    (root / "label-config.xml").write_text("<View/>")

    with pytest.raises(DataError, match="predictions, not labels"):
        open_folder(root)
    assert open_folder(root, "folders").train.labels == ("cat", "dog")


@pytest.mark.parametrize("name", ["7", "true", "null", "1979-05-27", "a,b", " a", '"a"', "[a]"])
def test_the_command_that_leaves_out_a_folder_names_it(tmp_path, name) -> None:
    make(tmp_path, four("a", "b", name))

    command = Reading(tmp_path, "folders", leave_out=name).command

    assert open_command(command).train.labels == ("a", "b")


def test_what_is_left_out_may_be_a_pattern_and_must_be_there(tmp_path) -> None:
    root = make(tmp_path, [*four("cat", "dog"), *four("old_1", "old_2")])

    assert open_folder(root, leave_out="old_*").train.labels == ("cat", "dog")
    with pytest.raises(DataError, match=r"odl_\*"):
        open_folder(root, leave_out="odl_*")


@pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case["name"])
def test_folders_of_public_repositories_come_out_as_described(tmp_path, case) -> None:
    files = [
        f"{folder}/{name}".lstrip("/").replace("{}", str(number + 1))
        for folder, patterns in case["images"].items()
        for name, count in patterns.items()
        for number in range(count)
    ]
    root = make(tmp_path, files)
    for name in case["others"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text\n")
    right = tuple(case["right"] or ())

    if case["outcome"] == "reads":
        assert not right or open_folder(root).train.labels == right
    else:
        classes = ask(root)
        assert bool(classes) == (case["outcome"] == "asks")
        assert not right or right in classes
