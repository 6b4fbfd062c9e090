"""`promote` and `classify` after a kill or a loss of power at any step: nothing is half done."""

import json
import os
import shutil
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from sopdeploy.base import files
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.live import LOG
from sopdeploy_commands.classify import run
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_commands.compare import BundleComparison
from sopdeploy_commands.promote import promote
from tests.support.crashes import LOSSES, end_at_each_step
from tests.support.service import picture_bytes, write_bundle
from tests.support.small_data import jpeg

pytestmark = pytest.mark.slow

promotion = import_module("sopdeploy_commands.promote")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPDEPLOY_THREADS", "1")


def restart(start: Path, folder: Path) -> None:
    """Make *folder* what *start* is; the next command is as one of a new process, which cleans it up."""
    files._CLEANED.clear()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder, symlinks=True)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def moves_of(folder: Path) -> list[tuple[str | None, str, bool]]:
    """The recorded moves; a line that is not complete is none."""
    moves = []
    for line in (folder / LOG).read_text().splitlines():
        with suppress(ValueError):
            move = json.loads(line)
            moves.append((move["before"], move["after"], move["refused"]))
    return moves


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("is_back", [False, True], ids=["to another bundle", "back"])
def test_a_link_leads_to_one_of_two_bundles_and_moves_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, is_back: bool
) -> None:
    start = tmp_path / "start"
    folder = tmp_path / "bundles"
    start.mkdir()
    first, second = (write_bundle(start, seed=seed).name for seed in (0, 1))
    promote(start / first, start / "live")
    photographs = tmp_path / "photographs"
    for number in range(20):
        path = photographs / "cat" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    if is_back:
        promote(start / second, start / "live", force="a test")
    before, after = (second, first) if is_back else (first, second)
    recorded = moves_of(start)
    restart(start, folder)

    def promote_it() -> None:
        live = folder / "live"
        if is_back:
            promote(back=live)
        else:
            promote(folder / second, live, photographs, tolerance=50)

    promote_it()
    complete = names(folder)

    # The comparison changes no file; it is not repeated.
    compared = json.loads((folder / LOG).read_text().splitlines()[-1])["comparison"]

    def compare_again(*_: object, **_options: object) -> BundleComparison:
        return BundleComparison.model_validate(compared)

    monkeypatch.setattr(promotion, "compare_loaded", compare_again)
    monkeypatch.setattr(
        promotion, "load_model", lambda path, _: SimpleNamespace(bundle=open_bundle(path))
    )

    ends = 0
    for ends in end_at_each_step(
        folder, LOSSES[loss], lambda: restart(start, folder), promote_it
    ):
        live = os.readlink(folder / "live")  # noqa: PTH115
        moves = moves_of(folder)
        assert live in {before, after}, ends
        assert moves[: len(recorded)] == recorded, ends
        assert moves[len(recorded) :] in ([], [(before, after, False)]), ends
        assert live == before or len(moves) > len(recorded), ends

        # The same command completes the move. After the move, only the
        # hidden folder of the link may be left.
        left = names(folder) - complete
        assert len(left) <= 1 or live == before, ends
        if live == before:
            promote_it()
            assert names(folder) == complete, ends
        assert os.readlink(folder / "live") == after, ends  # noqa: PTH115
    assert ends >= 5


OPTIONS = ClassifyOptions(workers=1, part_images=4)


@pytest.mark.parametrize(
    ("out", "loss"),  # of a folder, a kill leaves more than a loss of power
    [("rows", "power lost"), ("rows.csv", "power lost"), ("rows.csv", "killed")],
)
def test_each_image_has_one_row_after_the_command_is_repeated(
    tmp_path: Path, bundle_path: Path, loss: str, out: str
) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()

    for number in range(6):
        (photographs / f"{number}.jpg").write_bytes(picture_bytes((20 * number, 100, 50)))

    start = tmp_path / "start"
    folder = tmp_path / "out"
    start.mkdir()
    options = OPTIONS if out == "rows" else ClassifyOptions()

    def classify() -> None:
        run.classify(bundle_path, [str(photographs)], folder / out, options=options, threads=1)

    def rows() -> list[Any]:
        if out.endswith(".csv"):
            return (folder / out).read_text(encoding="utf-8-sig").splitlines()
        return pq.read_table(folder / out).to_pylist()

    restart(start, folder)
    classify()
    complete = rows()
    complete_names = names(folder)

    ends = 0
    for ends in end_at_each_step(
        folder, LOSSES[loss], lambda: restart(start, folder), classify
    ):
        # What has its name is complete.
        if (folder / out).is_file():
            assert rows() == complete, ends
        for part in folder.rglob("part-*.parquet"):
            assert pq.read_table(part).num_rows in {2, 4}, ends

        classify()
        assert rows() == complete, ends
        assert names(folder) == complete_names, ends

    assert ends >= 3
