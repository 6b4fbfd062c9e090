"""A file is an image if its bytes say so, whatever its name is, for every command that reads files."""

import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.data.folders.check import check_data
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.folders.table import read_label_table
from sopdeploy.data.photos.any_images import open_any_images
from sopdeploy.data.photos.outputs import check_takes_output
from sopdeploy.errors import ConfigError, DataError
from sopdeploy_commands.app import app
from sopdeploy_commands.classify.sources import list_sources
from tests.support.pictures import encoded
from tests.support.service import LABELS

PICTURE = Image.radial_gradient("L").convert("RGB")
JPEG = encoded(PICTURE, "JPEG")
PNG = encoded(PICTURE, "PNG")
# As phones write them
SEVERAL = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
WEB_PAGE = b"\n<!DOCTYPE html><html><title>404</title></html>"
IMAGES = {
    "IMG_1": JPEG, "a.jfif": SEVERAL, "b.JPG.download": JPEG, "c.png": JPEG, "d.dat": PNG,
    "e.bmp2": encoded(PICTURE, "BMP"), "f~": encoded(PICTURE, "WEBP"), "g.tmp": encoded(PICTURE, "GIF"),
}  # fmt: skip
OTHERS = {
    "notes.txt": b"BMW, 3 photographs of it", "scan": encoded(PICTURE, "TIFF"), "h.jpg.partial": JPEG,
    "clip.mp4": b"\0\0\0\x18ftypisom", "sound": b"RIFF\0\0\0\0WAVEfmt ", "empty": b"", "page.html": WEB_PAGE,
}  # fmt: skip
NAMES = sorted(IMAGES)


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in (IMAGES | OTHERS).items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "waits")
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for label in LABELS[:2]:
        fill(tmp_path / "photos" / label)
    return tmp_path / "photos"


def listed_by_table(root: Path) -> list[str]:
    lines = [f"{LABELS[0]}/{name},{LABELS[len(name) % 2]}" for name in NAMES]
    (root / "labels.csv").write_text("\n".join(["file,classes", *lines]))
    opened = read_label_table(root / "labels.csv")
    assert opened.ignored[".txt"] == 2
    return [Path(opened.parts["all"].describe(index)).name for index in range(len(lines))]


def in_archive(root: Path) -> list[str]:
    with tarfile.open(root / "x.tar", "w") as archive:
        for name in (*IMAGES, *OTHERS):
            archive.add(root / LABELS[0] / name, name)
    return [Path(image.path).name for image in list_sources([str(root / "x.tar")])]


def in_store(root: Path) -> list[str]:
    store = fsspec.filesystem("memory")
    for name, content in (IMAGES | OTHERS).items():
        store.pipe(f"/what/{name}", content)
    try:
        return [Path(image.path).name for image in list_sources(["memory://what"])]
    finally:
        store.rm("/what", recursive=True)


def of_first_class(images: object) -> list[str]:
    return [Path(images.describe(index)).name for index in range(len(IMAGES))]


READERS: dict[str, Callable[[Path], list[str]]] = {
    "train": lambda root: of_first_class(open_folder(root).train),
    "eval": lambda root: of_first_class(open_evaluation_images(root, tuple(LABELS[:2]))),
    "predict, calibrate, unknown": lambda root: of_first_class(open_any_images(root)),
    "classify, folder": lambda root: [
        Path(one.path).name for one in list_sources([str(root / LABELS[0])])
    ],
    "classify, files": lambda root: [
        Path(one.path).name
        for one in list_sources([str(root / LABELS[0] / name) for name in NAMES])
    ],
    "classify, archive": in_archive,
    "classify, store": in_store,
    "table": listed_by_table,
}


@pytest.mark.parametrize("command", READERS)
def test_every_command_reads_the_files_whose_bytes_are_an_image(
    command: str, classes: Path
) -> None:
    assert sorted(READERS[command](classes)) == NAMES


def test_a_check_counts_images_by_bytes_and_other_files_by_endings(classes: Path) -> None:
    report = check_data(classes)

    assert report.unreadable == ()
    assert report.parts[0].count == 2 * len(IMAGES)
    assert report.formats == {"JPEG": 8, "PNG": 2, "BMP": 2, "WEBP": 2, "GIF": 2}
    assert Counter(report.passed_over).total() == 2 * (len(OTHERS) + 1)


@pytest.mark.parametrize("content", IMAGES.values())
def test_bundles_are_not_written_beside_photographs_without_an_ending(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "IMG_1").write_bytes(content)
    with pytest.raises(ConfigError, match="holds photos"):
        check_takes_output(tmp_path, "out")


@pytest.mark.parametrize("name", ["notes.txt", "scan"])
def test_a_table_may_not_list_a_file_that_is_not_an_image(name: str, classes: Path) -> None:
    (classes / "labels.csv").write_text(f"file,classes\n{LABELS[0]}/{name},a\n")
    with pytest.raises(DataError, match=f"line 2: .*{name}"):
        read_label_table(classes / "labels.csv")


def test_a_web_page_with_the_ending_of_an_image_is_named(tmp_path: Path) -> None:
    for number in range(2):
        for label in LABELS[:2]:
            path = tmp_path / label / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(JPEG)
    path.write_bytes(WEB_PAGE)
    (problem,) = check_data(tmp_path).unreadable

    assert f"{path}: HTML" in problem


@pytest.mark.parametrize("command", [["predict"], ["eval", "--data"]], ids=["predict", "eval"])
def test_a_command_ends_with_what_it_did_not_use(
    command: list[str], bundle_path: Path, classes: Path
) -> None:
    name, *option = command
    words = [name, str(bundle_path), *option, str(classes)]
    done = CliRunner().invoke(app, words)

    assert done.exit_code == 0, done.output

    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{classes}: 16 files ")
    assert "ending 8" in last
