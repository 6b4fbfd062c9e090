"""A FIFO, socket or device with an image suffix is an unreadable image; no reader waits for it."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sopdeploy.data.check import check_data
from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.sources import open_data
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.precision.accuracy_gate import calibration_images
from sopdeploy_service.commands.batch.sources import ListedImage, list_sources, read_listed
from sopdeploy_service.commands.predict import read_image
from tests.sopdeploy.data.small_data import jpeg, write_classes

RULES = Preprocess(resize=8, crop=8, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)

pytestmark = pytest.mark.timeout(60)  # a reader that waits for a FIFO waits forever


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))  # the limit of an address is 107 bytes


KINDS: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "socket": bind_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture(params=KINDS)
def special(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A file of each kind, named like the first image of a class in a folder of images."""
    monkeypatch.chdir(tmp_path)
    folder = write_classes(tmp_path / "photos", ("cat", "dog"), each=8)
    path = folder / "cat" / "00.jpg"
    KINDS[request.param](path)
    return path


def fails(call: Callable[[], object], error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def test_every_reader_of_a_folder_names_the_file(special: Path) -> None:
    root, listed = special.parents[1], f"{special}: "
    split = open_data(FolderConfig(kind="folder", path=root))
    kept = open_data(FolderConfig(kind="folder", path=root, skip_corrupt=True))
    assert kept.skipped == (str(special),)
    assert f"{listed}cannot be read" in fails(lambda: [[*part] for part in (split.train, split.held_out)])
    assert [error.startswith(listed) for error in check_data(root).unreadable] == [True]
    assert fails(lambda: calibration_images(root, RULES)).startswith(f"{listed}cannot be read")
    assert fails(lambda: read_image(special, 1000)).startswith(f"{listed}cannot be read (not a regular file)")


def test_classify_gives_the_file_a_row_with_an_error(special: Path) -> None:
    images = list(list_sources([str(special.parents[1])]))
    assert str(special) in [image.path for image in images]
    message = fails(lambda: read_listed(ListedImage(str(special), str(special)), 1000), ImageError)
    assert message == "cannot be read (not a regular file)"


def test_a_folder_with_an_image_suffix_is_no_image(tmp_path: Path) -> None:
    (write_classes(tmp_path, ("cat",), each=3) / "cat" / "9.jpg").mkdir()
    assert len(calibration_images(tmp_path, RULES)) == 3


@pytest.mark.parametrize("suffix", [".tar", ".txt"])
@pytest.mark.parametrize("kind", KINDS)
def test_classify_rejects_a_source_that_is_no_regular_file(
    suffix: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[kind](source := tmp_path / f"photos{suffix}")
    assert "not a regular file" in fails(lambda: list(list_sources([str(source)])))


def test_an_image_may_still_come_from_a_pipe_without_an_image_suffix() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(jpeg(0))
    assert read_image(Path(f"/dev/fd/{reading}"), 10_000).body == jpeg(0)
    os.close(reading)
