import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError, DataError


def paint(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make(root: Path, **counts: int) -> Path:
    """Make a folder with so many images per class; `__` in a name is a slash."""
    for name, count in counts.items():
        (root / name.replace("__", "/")).mkdir(parents=True)
        for number in range(count):
            paint(root / name.replace("__", "/") / f"{number:03}.jpg", number)
    return root


def names(images) -> list[str]:
    assert isinstance(images, ImageFiles)
    return [os.fsdecode(path) for path in images.paths]


def open_at(path: Path, **settings: object):
    return open_folder(FolderConfig(kind="folder", path=path, **settings))


def test_classes_are_sorted_and_hidden_and_other_files_ignored(tmp_path) -> None:
    make(tmp_path, zebra=5, ant=5, Bee=5)
    paint(tmp_path / ".ipynb_checkpoints" / "copy.png")
    paint(tmp_path / "ant" / ".hidden.png")
    paint(tmp_path / "ant" / ".trash" / "old.png")
    (tmp_path / "ant" / "notes.txt").write_text("six legs")
    (tmp_path / "README").write_text("mine")
    split = open_at(tmp_path)
    assert split.train.labels == split.held_out.labels == ("Bee", "ant", "zebra")
    assert (len(split.train), len(split.held_out)) == (12, 3)


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp", "bmp", "tif", "gif", "PPM"])
def test_every_image_suffix_is_read(tmp_path, ending) -> None:
    make(tmp_path, a=2, b=2)
    paint(tmp_path / "c" / f"one.{ending}")
    paint(tmp_path / "c" / "below" / f"two.{ending}")
    split = open_at(tmp_path)
    assert {name for name in names(split.train) + names(split.held_out) if name.startswith("c")} == {
        f"c/one.{ending}",
        f"c/below/two.{ending}",
    }


def test_a_split_is_the_same_every_time_and_changes_with_its_own_seed(tmp_path) -> None:
    make(tmp_path, a=20, b=20)
    held = names(open_at(tmp_path).held_out)
    assert names(open_at(tmp_path).held_out) == held
    assert names(open_at(tmp_path, hold_out_seed=1).held_out) != held
    assert len(open_at(tmp_path, hold_out=0.5).held_out) == 20
    assert not set(held) & set(names(open_at(tmp_path).train))


def test_a_copy_of_the_folder_has_the_same_split(tmp_path) -> None:
    first, second = make(tmp_path / "x", a=9, b=9), make(tmp_path / "y", b=9, a=9)
    assert names(open_at(first).held_out) == names(open_at(second).held_out)


@pytest.mark.parametrize("held", ["val", "valid", "validation", "test"])
def test_train_and_held_out_folders_are_mapped_by_name(tmp_path, held) -> None:
    make(tmp_path, train__b=3, train__a=2, **{f"{held}__a": 1, f"{held}__b": 1})
    split = open_at(tmp_path)
    assert (len(split.train), len(split.held_out)) == (5, 2)
    assert [split.train.labels[split.train[i][1]] for i in range(5)] == ["a", "a", "b", "b", "b"]
    assert split.held_out.labels == ("a", "b")


@pytest.mark.parametrize(
    ("counts", "labels", "sizes"),
    [
        ({"train__a": 2, "train__b": 2, "val__a": 1, "val__b": 1, "test__a": 3, "test__b": 3}, "ab", (4, 2)),
        ({"train__a": 5, "train__b": 5}, "ab", (8, 2)),
        ({"test": 3, "rest": 3}, ("rest", "test"), (4, 2)),
    ],
    ids=["val is preferred to test", "train alone is split", "a class named test"],
)
def test_special_folder_names(tmp_path, counts, labels, sizes) -> None:
    split = open_at(make(tmp_path, **counts))
    assert split.train.labels == tuple(labels)
    assert (len(split.train), len(split.held_out)) == sizes


def test_a_file_name_that_is_not_utf8_is_read(tmp_path) -> None:
    make(tmp_path, a=2, b=2)
    odd = os.fsdecode(b"\xff\xfe.jpg")
    try:
        (tmp_path / "a" / "000.jpg").rename(tmp_path / "a" / odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    split = open_at(tmp_path)
    both = [*(split.train[i] for i in range(2)), *(split.held_out[i] for i in range(2))]
    assert len(both) == 4


BAD_FOLDERS = [
    ({}, "holds no class folders; sort the images into one subfolder per class"),
    ({"a": 3}, "holds only one class (a); a classifier needs at least two"),
    ({"a": 3, "b": 0}, "b: no images in this class folder; add some"),
    ({"a": 3, "b": 1}, "b: only one image; add another"),
    ({"train": 0}, "train: holds no class folders"),
    ({"train__a": 2, "train__b": 2, "val__a": 1}, "val: training classes b are missing, add them"),
    (
        {"train__a": 2, "train__b": 2, "val__a": 1, "val__b": 1, "val__c": 1, "val__d": 1},
        "val: classes c, d are not training classes, remove them",
    ),
    ({"train__a": 2, "train__b": 2, "val__a": 1, "val__b": 0}, "b: no images in this class folder"),
    ({"val__a": 2, "val__b": 2}, "holds val but no train; put the training images there"),
]


@pytest.mark.parametrize(("counts", "message"), BAD_FOLDERS, ids=[m[:30] for _, m in BAD_FOLDERS])
def test_an_unusable_folder_is_named_with_advice(tmp_path, counts, message) -> None:
    make(tmp_path, **counts)
    with pytest.raises(DataError) as problem:
        open_at(tmp_path)
    assert message in str(problem.value)
    assert str(tmp_path) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder; give a folder or tar file"):
        open_at(tmp_path / "nowhere")


def test_a_missing_path_names_the_key_to_set() -> None:
    with pytest.raises(ConfigError, match=r"data\.path: not set; give --data DIR"):
        open_folder(FolderConfig(kind="folder"))


def test_a_folder_without_read_permission_is_named(tmp_path, monkeypatch) -> None:
    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="cannot be listed"):
        open_at(tmp_path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


BAD_IMAGES = [
    ("text", lambda path: path.write_text("no image"), "not an image; delete or replace it"),
    ("empty", lambda path: path.write_bytes(b""), "not an image; delete or replace it"),
    ("truncated", cut_short, "cannot be read"),
    ("a folder", lambda path: (path.unlink(), path.mkdir()), None),
    ("gone", lambda path: path.unlink(), "cannot be read"),
]


@pytest.mark.parametrize(("_name", "spoil", "message"), BAD_IMAGES, ids=[name for name, *_ in BAD_IMAGES])
def test_an_unreadable_image_is_named(tmp_path, _name, spoil, message) -> None:
    make(tmp_path, a=4, b=4)
    split = open_at(tmp_path)
    path = split.train.store.root / os.fsdecode(split.train.paths[2])
    spoil(path)
    if message is None:
        assert len(open_at(tmp_path).train) == 5
        return
    with pytest.raises(DataError, match=message) as problem:
        split.train[2]
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)
