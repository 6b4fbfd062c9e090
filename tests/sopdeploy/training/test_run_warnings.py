"""Warnings of a run stand in its result, its page, the list of runs and the rows of its model card."""

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sopdeploy.training.callback import Callback, ForwardingCallback, WarningRecord
from sopdeploy.training.records.summary import read_summary, training_rows
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import TrainingResult
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy_commands.runs_page import list_runs, read_run
from tests.sopdeploy.training.runs import SMALL, RecordingCallback, paint, train_with_page

SETTINGS = {
    "few_shot": [
        "model.name=resnet8",
        "model.config={}",
        *SMALL[2:],
        "procedure.kind=few_shot",
    ],
    "loop": [*SMALL, "procedure.kind=loop", "epochs=2"],
}

OF_FOLDERS = (
    r"are training images|different labels|without a class"  # what warnings about them say
)


def train(photos: Path, out: Path, procedure: str, **options: Any) -> TrainingResult:
    """Train on *photos* by the *procedure*, and write the page."""
    settings = [*SETTINGS[procedure], f"data.path={photos}"]
    return train_with_page(read_recipe("photos", settings), out, **options)


def copy_all(photos: Path) -> None:
    """Make the held-out images the training images."""
    shutil.rmtree(photos / "val")
    shutil.copytree(photos / "train", photos / "val")


def copy_one(photos: Path) -> None:
    """Add a training image to the held-out ones."""
    shutil.copy(photos / "train" / "red" / "0.png", photos / "val" / "red" / "copy.png")


def copy_class(photos: Path) -> None:
    """Make the held-out images of one class its training images."""
    shutil.rmtree(photos / "val" / "red")
    shutil.copytree(photos / "train" / "red", photos / "val" / "red")


def label_twice(photos: Path) -> None:
    """Give a training image two labels."""
    shutil.copy(photos / "train" / "red" / "0.png", photos / "train" / "blue" / "again.png")


def add_loose_image(photos: Path) -> None:
    """Add an image that is in no class."""
    shutil.copy(photos / "train" / "red" / "0.png", photos / "train" / "loose.png")


def leave_as_it_is(_photos: Path) -> None:
    """Change nothing."""


# The change, the procedure, the warning, how many images are judged, and where the score comes from
FOLDERS: list[tuple[Callable[[Path], None], str, str, int, str]] = [
    (leave_as_it_is, "few_shot", "", 9, "held-out"),
    (
        copy_all,
        "few_shot",
        "18 of 18 .*cross-validated on the training",
        18,
        "cross-validation",
    ),
    (
        copy_class,
        "few_shot",
        "6 of 12 .*cross-validated on the training",
        18,
        "cross-validation",
    ),
    (copy_one, "few_shot", "1 of 10 .*so they are not judged", 9, "held-out"),
    (label_twice, "few_shot", "the same file has different labels", 9, "held-out"),
    (add_loose_image, "few_shot", "loose", 9, "held-out"),
    (leave_as_it_is, "loop", "", 9, ""),
    (copy_all, "loop", "18 of 18 .*the score is too high", 18, "too high"),
    (copy_class, "loop", "6 of 12 .*the score is too high", 12, "too high"),
    (copy_one, "loop", "1 of 10 .*so they are not judged", 9, ""),
    (label_twice, "loop", "the same file has different labels", 9, ""),
]


@pytest.mark.slow
@pytest.mark.usefixtures("allow_random_features")
@pytest.mark.parametrize(
    ("change", "procedure", "expected", "count", "origin"),
    FOLDERS,
    ids=[f"{change.__name__} {procedure}" for change, procedure, *_ in FOLDERS],
)
def test_page_list_card_and_result_have_the_same_warnings_and_scores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    procedure: str,
    expected: str,
    count: int,
    origin: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    paint(photos / "train", 6)
    paint(photos / "val", 3, seed=1)
    change(photos)

    callback = RecordingCallback()
    result = train(photos, Path("runs/photos-1"), procedure, callback=callback)
    told = [values["warning"] for kind, values in callback.events if kind == "warning"]

    assert result.warnings == tuple(told)

    # A network of random weights also causes warnings that have nothing to do with the folder.
    of_images = [warning for warning in told if re.search(OF_FOLDERS, warning)]
    assert len(of_images) == bool(expected)
    assert all(re.search(expected, warning) for warning in of_images)

    # The same warnings everywhere, first on the page.
    page = html.unescape((result.out / "report.html").read_text("utf-8"))
    header = page.partition("<main>")[2].partition("<dl>")[0]
    assert all(warning in header for warning in told)
    assert ('<ul class="warnings">' in header) == bool(told)

    best = read_checkpoint(result.best)
    assert best.training.get("warnings", []) == told

    (row,) = list_runs()
    assert row.warnings == result.warnings

    rows = training_rows(best.training)
    assert [text for name, text in rows if name == "warning"] == told

    # The same score everywhere.
    score = result.procedure.top1
    assert score is not None
    assert score.count == count

    described = dict(rows)["accuracy"]
    assert row.estimate == described
    assert f"{100 * score.share:.1f} %" in str(described)
    if procedure == "few_shot":
        assert result.procedure.estimated_on == origin
        assert result.procedure.describe_score()[1:] in page
    else:
        assert ("training images" in str(described)) == bool(origin)


def test_a_finished_run_tells_its_warnings_again(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    paint(photos / "train", 6)
    paint(photos / "val", 3, seed=1)
    copy_one(photos)
    out = tmp_path / "run"
    first = train(photos, out, "few_shot")
    again = train(photos, out, "few_shot", resume=True)

    assert sum("validation images" in warning for warning in first.warnings) == 1
    assert len(set(first.warnings)) == len(first.warnings)
    assert (again.warnings, again.procedure.top1) == (first.warnings, first.procedure.top1)
    assert (again.held_out_count, first.held_out_count) == (9, 9)


def test_the_list_of_runs_reads_no_checkpoint_of_runs_with_a_summary(tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", 6)
    result = train(photos, tmp_path / "run", "few_shot")
    _, expected = read_run(result.best)

    assert (result.out / "run.json").stat().st_size < 10_000

    # Without the summary, as in runs of 0.2.0, or with a damaged one, the checkpoint is read.
    for content in (None, b"{", b'{"project": 1}'):
        (result.out / "run.json").unlink()
        if content is not None:
            (result.out / "run.json").write_bytes(content)
        assert read_run(result.best)[1] == expected
        (result.out / "run.json").touch()

    (result.out / "run.json").unlink()
    assert read_summary(result.out) is None

    result.best.write_bytes(b"damaged")
    assert read_run(result.best)[1].problem


def test_a_warning_is_told_once_and_earlier_ones_are_kept() -> None:
    callback = RecordingCallback()
    record = WarningRecord(callback)
    record.keep(["of the run before"])
    for warning in ("new", "of the run before", "new"):
        record.on_warning(warning)

    assert record.warnings == ["of the run before", "new"]
    assert [values["warning"] for _, values in callback.events] == ["new", "of the run before"]

    passed_on = {name for name in vars(Callback) if name.startswith("on_")}
    assert passed_on <= vars(ForwardingCallback).keys()
