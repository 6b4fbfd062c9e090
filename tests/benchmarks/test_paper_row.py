"""The paper's row: its plan, and the whole path with a program in the place of `sopdeploy`, or with it."""

import json
import shutil
import subprocess
import sys
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import paper_row
import pytest

from tests.support.small_data import write_classes

SCRIPT = Path(paper_row.__file__)
# Trains one epoch each time it is called, with these accuracies; fails in the folder of seed 1 as long as the
# file `broken` is beside `dsop`.
STAND_IN = """
import os, pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
if "export" in words:
    print('{"bundle": "%s"}' % out)
    sys.exit()
if out.name == "seed-1" and (out.parent.parent / "broken").exists():
    sys.exit("no memory")
if os.getpgrp() != os.getpid():
    sys.exit("Ctrl-C and the signal of paper_row are two")
out.mkdir(exist_ok=True)
history = out / "history.csv"
lines = history.read_text().splitlines() if history.exists() else ["epoch,top1,images_per_second"]
top1 = {"plain": 0.5, "dsop": 0.75}[out.parent.name] + 0.125 * (out.name == "seed-1")
history.write_text("\\n".join([*lines, f"{len(lines)},{top1},100"]))
"""


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def plan(*options: object) -> dict[str, Any]:
    return paper_row.plan(paper_row.parse_arguments([str(option) for option in options]))


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Write the two archives of a small data set."""
    data = tmp_path / "data"
    for part, count in (("train", 4), ("test", 2)):
        write_classes(data / part, ["cat", "dog"], count)
        with tarfile.open(data / f"{part}.tar.xz", "w:xz") as archive:
            archive.add(data / part, part)
        shutil.rmtree(data / part)
    return data


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the program `STAND_IN` in the place of `sopdeploy`, and do not wait a second for it."""
    sleep = paper_row.time.sleep
    monkeypatch.setattr(paper_row, "SOPDEPLOY", [sys.executable, "-S", "-c", STAND_IN])
    monkeypatch.setattr(paper_row.time, "sleep", lambda _: sleep(0.01))
    monkeypatch.setattr(paper_row, "gpu_share", lambda: 75.0)


def train(data: Path, out: Path, *options: object) -> tuple[int, dict[str, Any]]:
    """Return the exit status of the row and its results."""
    words = ["--data", data, "--out", out, "--json", *options]
    code = paper_row.main(paper_row.parse_arguments([str(word) for word in words]))
    return code, strict((out / "results.json").read_text())


def test_a_dry_run_names_what_is_copied_and_the_minutes_and_writes_nothing(archives, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ("--data", archives, "--out", tmp_path / "out", "--dry-run", "--json")
    done = run(*options, "--seeds", 2)
    assert (done.returncode, done.stderr) == (0, "")
    planned = strict(done.stdout)
    for part in ("train", "test"):
        archive = archives / f"{part}.tar.xz"
        assert planned["copied"][str(archive)] == archive.stat().st_size
    assert planned["copied_bytes"] == sum(planned["copied"].values()) <= 60 * 2**20
    assert (planned["trainings"], planned["steps_per_training"]) == (4, 160 * 196)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("gpu", "python", "at_once", "steps", "busy"),
    [
        (4, (2, 3), 1, {"plain": 4, "dsop": 4}, 100),  # the GPU is slower than Python
        (4, (8, 16), 1, {"plain": 8, "dsop": 16}, 100 * 8 / 24),
        (4, (8, 16), 2, {"plain": 8, "dsop": 16}, 100 * 8 / 16),  # the first ends halfway
        (4, (4, 8), 2, {"plain": 4, "dsop": 8}, 80),  # wants 1.5 GPUs: 6 + 4 ms per step
    ],
)
def test_the_plan_takes_the_longer_of_gpu_and_python_and_shares_the_gpu(
    archives, gpu, python, at_once, steps, busy
) -> None:
    options = ("--step-ms", gpu, "--python-ms", *python, "--at-once", at_once, "--seeds", 1)
    planned = plan("--data", archives, *options)
    assert planned["ms_per_step_alone"] == steps
    assert planned["gpu_busy_percent"] == round(busy)
    effective = 160 * (196 + 40 / 3)
    alone = {arm: round(effective * ms / 60e3, 1) for arm, ms in steps.items()}
    assert planned["minutes_per_training_alone"] == alone
    gpu_minutes = effective * 2 * gpu / 60e3
    assert planned["minutes"] == pytest.approx(gpu_minutes * 100 / busy + 80 / 60, abs=0.4)


def test_with_defaults_a_gpu_is_busy_for_most_of_the_time_and_16_cores_suffice(archives) -> None:
    planned = plan("--data", archives)
    _, dsop = paper_row.PYTHON_MS
    assert planned["ms_per_step_alone"]["dsop"] == round(dsop, 1) >= planned["ms_per_step_alone"]["plain"]
    assert planned["cores"] <= 16
    for plain in (4, dsop / 2, dsop):
        assert plan("--data", archives, "--python-ms", plain, dsop)["gpu_busy_percent"] >= 80


@pytest.mark.parametrize(("minutes", "fits"), [(5, False), (500, True)])
def test_the_plan_says_whether_it_fits_into_the_minutes(archives, minutes, fits) -> None:
    planned = plan("--data", archives, "--minutes", minutes)
    assert (planned["minutes_given"], planned["fits"]) == (minutes, fits)
    assert "fits" not in plan("--data", archives)


def test_the_plan_compares_numbers_of_seeds_and_counts_short_runs(archives) -> None:
    planned = plan("--data", archives, "--minutes", 15, "--seeds", 2, "--at-once", 4)
    of_seeds = planned["minutes_of_seeds_side_by_side"]
    assert of_seeds["1"] < of_seeds["2"] == planned["minutes"] < of_seeds["4"]
    starts = 20 / 60 * planned["runs"]  # each run starts the trainings again
    assert 15 * (planned["runs"] - 1) < planned["minutes"] + starts <= 15 * planned["runs"] + 20 / 60


@pytest.mark.parametrize("option", ["--at-once", "--seeds", "--epochs", "--batch-size"])
def test_numbers_below_one_are_refused(archives, option, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan("--data", archives, option, 0)
    assert f"argument {option}: 0: not a whole number of at least 1" in capsys.readouterr().err


def test_more_than_the_limit_ends_the_dry_run_with_1(archives) -> None:
    with (archives / "train.tar.xz").open("ab") as file:
        file.truncate(61 * 2**20)  # a sparse file
    assert paper_row.main(paper_row.parse_arguments(["--data", str(archives), "--dry-run"])) == 1


def test_missing_archives_are_named_in_one_line(tmp_path) -> None:
    with pytest.raises(SystemExit) as exit:
        plan("--data", tmp_path)
    assert exit.value.code == f"{tmp_path}: holds neither train.tar.xz nor train"


def test_archives_are_unpacked_once_and_again_after_an_interruption(archives, tmp_path) -> None:
    out = tmp_path / "out"
    partial = out / ".train.partial"
    partial.mkdir(parents=True)
    (partial / "half an image").touch()
    assert paper_row.unpack(archives, out) == out
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.jpg"))
    assert files == [
        *(f"test/{label}/{number}.jpg" for label in ("cat", "dog") for number in range(2)),
        *(f"train/{label}/{number}.jpg" for label in ("cat", "dog") for number in range(4)),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["test", "train"]
    (archives / "train.tar.xz").write_bytes(b"not read again")
    assert paper_row.unpack(archives, out) == out
    assert paper_row.unpack(out, tmp_path / "other") == out  # folders are used where they are


def test_one_seed_is_written_as_strict_json_with_its_origin(archives, tmp_path, stand_in) -> None:
    code, found = train(archives, tmp_path / "out", "--seeds", 1, "--epochs", 1)
    assert code == 0
    assert (found["seeds"], found["errors"]) == ([0], {"plain": [50.0], "dsop": [25.0]})
    assert found["dsop_minus_plain"] == {"n": 1, "mean": -25.0, "half": None, "wins": 0, "p": None}
    assert (found["gpu_busy_percent"], found["images_per_second_of_one"]) == (75.0, 100.0)
    assert found["export"] == {"bundle": str(tmp_path / "out" / "bundles")}
    date.fromisoformat(found["date"])
    assert found["commit"]
    assert {"machine", "versions"} <= found.keys()


def test_a_failed_training_is_told_and_the_same_command_finishes_it_alone(
    archives, tmp_path, stand_in, capsys
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken").touch()
    options = ("--seeds", 2, "--epochs", 1)
    code, found = train(archives, out, *options)
    assert (code, found["seeds"]) == (1, [0])
    told = capsys.readouterr().err
    for arm in ("plain", "dsop"):
        log = out / arm / "seed-1.log"
        assert (log.read_text(), f"{log}: exit code 1\n" in told) == ("no memory\n", True)
        assert f"{arm} seed 0 epoch 1: error " in told
    (out / "broken").unlink()
    finished = out / "dsop" / "seed-0" / "history.csv"
    before = finished.read_text()
    code, found = train(archives, out, *options)
    assert (code, found["seeds"]) == (0, [0, 1])
    assert finished.read_text() == before  # not trained again
    difference = found["dsop_minus_plain"]
    assert (difference["mean"], difference["half"]) == (-25.0, 0.0)


def test_after_the_minutes_nothing_starts_and_the_row_is_unfinished(archives, tmp_path, stand_in) -> None:
    code, found = train(archives, tmp_path / "out", "--minutes", 0)
    assert (code, found["seeds"], found["dsop_minus_plain"]) == (1, [], {})
    assert "export" not in found


@pytest.mark.slow
def test_a_stopped_row_goes_on_and_exports_a_proved_network(archives, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("--data", archives, "--out", out, "--seeds", 1, "--epochs", 2, "--workers", 0, "--json")
    options = (*options, "--device", "cpu", "--batch-size", 4)
    assert run(*options, "--minutes", 0.1).returncode in (0, 1)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    found = strict((out / "results.json").read_text())
    assert found["seeds"] == [0]
    assert found["export"]["bundle"]
    assert run(*options).returncode == 0  # nothing is left to train
