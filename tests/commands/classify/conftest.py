"""A folder of images, three of which are bad, and one uninterrupted run on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sopdeploy_commands.classify import run
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_service.settings import Settings
from tests.support.service import picture_bytes

COUNT = 100
BAD = {17: b"text", 40: b"", 41: picture_bytes()[:300]}  # by position
SETTINGS = Settings(threads=1)
OPTIONS = ClassifyOptions(workers=1, part_images=32)


def classify(
    bundle: Path,
    sources: list[str],
    out: Path,
    settings: Settings = SETTINGS,
    options: ClassifyOptions = OPTIONS,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> run.Classified:
    given = settings.model_dump(exclude_unset=True)
    return run.classify(bundle, sources, out, options=options, on_image=on_image, **given)


def write_photos(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir()
    for number in range(count):
        body = picture_bytes(
            (2 * number % 256, 250 - 2 * number % 250, 30), size=(40 + number % 7, 38)
        )
        (folder / f"{number:03d}.jpg").write_bytes(BAD.get(number, body))
    (folder / "notes.md").write_text("not an image")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("classify") / "photos")


@pytest.fixture(scope="session")
def complete(bundle_path: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run without interruption."""
    out = tmp_path_factory.mktemp("complete") / "out"
    classify(bundle_path, [str(photos)], out, SETTINGS, OPTIONS)
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "rows").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def part_bytes(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (out / "rows").iterdir()}


class StopError(Exception):
    """Stands for anything that ends a run."""


def stop_at(images: int) -> Callable[[int, int], None]:
    def on_image(done: int, _total: int) -> None:
        if done >= images:
            raise StopError

    return on_image
