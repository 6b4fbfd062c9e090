"""The walker of all commands lists each real folder once, in linear time."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.data.folders.check import check_data
from sopdeploy.data.folders.class_folders import list_classes
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.photos import files
from sopdeploy.data.photos.any_images import open_any_images
from sopdeploy.data.photos.contents import list_contents
from sopdeploy.data.photos.files import walk
from sopdeploy.errors import DataError
from tests.sopdeploy.data.folders.test_folder import make, paint

IMAGES = 4  # in every folder that `FOLDERS` makes


def fan_out(root: Path, size: int) -> None:
    """Folders side by side, each with two links to the next one: 2^size paths."""
    for number in range(size):
        (root / "a" / f"n{number}").mkdir(parents=True)
        for link in "xy":
            (root / "a" / f"n{number}" / link).symlink_to(f"../n{number + 1}")
    make(root / "a", **{f"n{size}": IMAGES})


def fan_out_elsewhere(root: Path, size: int) -> None:
    """The same outside of the root, behind one link."""
    fan_out(root.parent / "elsewhere", size)
    (root / "a").mkdir(parents=True)
    (root / "a" / "link").symlink_to(root.parent / "elsewhere" / "a" / "n0")


def fan_in(root: Path, size: int) -> None:
    """Many links to one folder."""
    make(root.parent / "elsewhere", photos=IMAGES)
    (root / "a").mkdir(parents=True)
    for number in range(size):
        (root / "a" / f"n{number}").symlink_to(root.parent / "elsewhere" / "photos")


def nested(root: Path, size: int) -> None:
    """A chain of folders, the images in the innermost one."""
    make(root / "a" / "/".join("d" * size), d=IMAGES)


def circles(root: Path, size: int) -> None:
    """Links to the folder itself, to those above it and to those below it."""
    make(root, a=IMAGES)
    for number in range(size):
        (root / "a" / f"n{number}").mkdir()
        for name, target in {
            "up": "..",
            "here": ".",
            "root": "../..",
            "next": f"../n{number + 1}",
        }.items():
            (root / "a" / f"n{number}" / name).symlink_to(target)


def every_pair(root: Path, size: int) -> None:
    """Folders that all lead to one hidden folder, which leads back."""
    make(root, a=0, **{".hidden": IMAGES})
    for number in range(size):
        (root / "a" / f"n{number}").mkdir(parents=True)
        (root / "a" / f"n{number}" / "photos").symlink_to("../../.hidden")
        (root / ".hidden" / f"back{number}").symlink_to(f"../a/n{number}")


def broken(root: Path, size: int) -> None:
    """Links that lead nowhere or to themselves, beside images."""
    make(root, a=IMAGES)
    for number in range(size):
        (root / "a" / f"n{number}").symlink_to("nowhere")
        (root / "a" / f"m{number}").symlink_to(f"m{number}")


FOLDERS = [fan_out, fan_out_elsewhere, fan_in, nested, circles, every_pair, broken]


def count_calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """Count how often *work* lists a folder or asks for the identity of one."""
    calls = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*values: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            return original(*values, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("list_folder", "folder_identity"):
            patch.setattr(files, name, counted(getattr(files, name)))
        work()
    return calls


@pytest.mark.parametrize("build", FOLDERS)
def test_each_folder_is_listed_once_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[Path, int], None]
) -> None:
    calls = {}
    for size in (15, 30):  # a path may have at most 40 links
        root = tmp_path / str(size) / "root"
        root.mkdir(parents=True)
        build(root, size)
        found = [path for path in walk(root) if path.suffix == ".jpg"]
        assert len({path.resolve() for path in found}) == len(found) == IMAGES
        calls[size] = count_calls(monkeypatch, lambda root=root: list(walk(root)))
        assert calls[size] == count_calls(monkeypatch, lambda root=root: open_any_images(root))

    assert calls[30] <= 2 * calls[15]


@pytest.mark.parametrize("build", FOLDERS)
def test_a_check_takes_linear_time(tmp_path: Path, monkeypatch, build) -> None:
    calls = {}
    for size in (15, 30):  # a path may have at most 40 links
        root = tmp_path / str(size) / "root"
        root.mkdir(parents=True)
        build(root, size)
        make(root, b=2)
        calls[size] = count_calls(
            monkeypatch, lambda root=root: check_data(root, classes_from="folders")
        )

    assert calls[30] <= 2 * calls[15]


def test_folders_deeper_than_the_stack_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which is restored, also if an assertion fails
    for _ in range(1500):  # `mkdir` takes no path that is so long
        Path("d").mkdir()
        os.chdir("d")
    paint(Path("1.jpg"))
    found = [path.name for path in walk(tmp_path)]
    Path("1.jpg").unlink()
    for _ in range(1500):  # neither does `rmtree`
        os.chdir("..")
        Path("d").rmdir()

    assert found == ["1.jpg"]


def test_a_path_that_is_too_long_is_named_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(25):
        Path("d" * 200).mkdir()
        os.chdir("d" * 200)

    with pytest.raises(DataError, match=r"^[^\n]*: .*too long[^\n]*$"):
        list(walk(tmp_path))


def test_the_path_of_an_image_is_that_without_links(tmp_path: Path) -> None:
    make(tmp_path, **{"b/photos": 1})
    (tmp_path / "a").symlink_to("b/photos")

    assert [str(path.relative_to(tmp_path)) for path in walk(tmp_path)] == ["b/photos/000.jpg"]


def test_a_folder_of_two_classes_counts_for_the_first(tmp_path: Path) -> None:
    root = make(tmp_path / "photos", a=2, b=2)
    make(tmp_path, more=3)
    (root / "a" / "more").symlink_to(tmp_path / "more")
    (root / "b" / "more").symlink_to(tmp_path / "more")
    (root / "a" / "other").symlink_to("../b")
    (root / "c").symlink_to(make(tmp_path / "elsewhere", c=2) / "c")
    images = list_classes(list_contents(root)).images

    assert dict(zip(images.labels, images.class_counts().tolist(), strict=True)) == {
        "a": 5,
        "b": 2,
        "c": 2,
    }
    assert len(open_folder(root, "folders").train) == 9


def test_hidden_files_are_listed_on_request(tmp_path: Path) -> None:
    make(tmp_path, **{".trash": 1, "a": 1})
    paint(tmp_path / "a" / ".hidden.jpg")
    assert [path.name for path in walk(tmp_path)] == ["000.jpg"]

    found = [str(path.relative_to(tmp_path)) for path in walk(tmp_path, hidden=True)]
    assert found == [".trash/000.jpg", "a/.hidden.jpg", "a/000.jpg"]
