"""The comparison of `benchmarks/own_photos.py`: draws, peers in other environments, statistics, chart."""

import json
import sys
from pathlib import Path

import own_photos
import pytest
from PIL import Image

CLASSES = ("hat", "shoes")
# A peer that knows the classes of the test files, except for shoes that it takes for hats.
ANSWERING = f"""#!{sys.executable}
import json, os, sys
program, request, answer = sys.argv[1:]
asked = json.load(open(request))
assert os.environ["OMP_NUM_THREADS"] == "1" and program.endswith("fastai_fine_tune.py")
assert len(asked["train"]) == 4 and asked["network"] == "tf_efficientnet_lite0"
json.dump({{"seconds": 12.5, "predicted": ["hat" for file in asked["test"]]}}, open(answer, "w"))
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("validation", 3)):
        for label in CLASSES:
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def arguments(photos: Path, *more: str) -> list[str]:
    weights = photos.parent / "weights.pth"
    weights.touch()
    return [
        "--data", str(photos), "--weights", str(weights), "--cache", str(photos.parent / "cache"), *more
    ]  # fmt: skip


def store(cache: Path, tool: str, accuracies: tuple[float, ...], seconds: float) -> None:
    cache.mkdir(exist_ok=True)
    for draw, accuracy in enumerate(accuracies):
        found = {"accuracy": accuracy, "seconds": seconds + draw}
        (cache / f"{tool}-10-{draw}.json").write_text(json.dumps(found))


def test_a_peer_runs_in_its_own_environment_and_its_result_is_kept(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = photos.parent / "python"
    python.write_text(ANSWERING)
    python.chmod(0o755)
    given = arguments(photos, "--tools", "fastai", "--per-class", "2", "--draws", "1")
    assert own_photos.main([*given, "--fastai-python", str(python)]) == 0
    assert "| fastai fine_tune | 2 | 1 | 50.0 | | 12 |" in capsys.readouterr().out
    python.unlink()
    assert own_photos.main(given) == 0, "a kept result needs no peer"


def test_differences_are_paired_by_draw_and_the_tuning_draw_is_left_out(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = photos.parent / "cache"
    store(cache, "sopdeploy", (70.0, 80.0, 75.0), 20)
    store(cache, "probe", (69.0, 79.0, 74.0), 10)
    store(cache, "fastai", (60.0,), 100)
    (cache / f"probe-10-{own_photos.TUNING_DRAW}.json").write_text('{"accuracy": 1, "seconds": 1}')
    chart = photos.parent / "chart.svg"
    assert own_photos.main(arguments(photos, "--draws", "0", "--chart", str(chart))) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[2:] == [
        "| sopdeploy train | 10 | 3 | 75.0 ± 12.4 | | 21 |",
        "| logistic regression | 10 | 3 | 74.0 ± 12.4 | +1.0 ± 0.0 | 11 |",
        "| fastai fine_tune | 10 | 1 | 60.0 | +10.0 (one draw) | 100 |",
    ]
    drawn = chart.read_text()
    assert "fastai fine_tune: 10 per class 60.0 % in 100 s" in drawn
    assert drawn == own_photos.chart(own_photos.read_table(table)) + "\n"


def test_the_chart_shows_the_values_of_the_page() -> None:
    docs = Path(__file__).parents[2] / "docs"
    points = own_photos.read_table((docs / "benchmarks" / "own_photos.md").read_text(encoding="utf-8"))
    assert {point.tool for point in points} == {"sopdeploy", "probe", "fastai", "autogluon-svm"}
    drawn = (docs / "pictures" / "own-photos.svg").read_text(encoding="utf-8")
    assert drawn == own_photos.chart(points) + "\n"
