"""The paper's row: the whole path with a program in the place of `sopdeploy`, or with it."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import paper_row
import pytest

from tests.support.small_data import write_classes

SCRIPT = Path(paper_row.__file__)
# Trains one epoch each time it is called, with these accuracies; fails in the folder of seed 1
# as long as the file `broken` is beside `dsop`.
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


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write a small data set."""
    data = tmp_path / "data"
    for part, count in (("train", 4), ("test", 2)):
        write_classes(data / part, ["cat", "dog"], count)
    return data


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the program `STAND_IN` in the place of `sopdeploy`, and do not wait a second for it."""
    sleep = paper_row.time.sleep
    monkeypatch.setattr(paper_row, "SOPDEPLOY", [sys.executable, "-S", "-c", STAND_IN])
    monkeypatch.setattr(paper_row.time, "sleep", lambda _: sleep(0.01))


def train(data: Path, out: Path, *options: object) -> tuple[int, dict[str, Any]]:
    """Return the exit status of the row and its results."""
    words = ["--data", data, "--out", out, *options]
    code = paper_row.main(paper_row.parse_arguments([str(word) for word in words]))
    return code, strict((out / "results.json").read_text())


@pytest.mark.parametrize("option", ["--at-once", "--seeds", "--epochs", "--batch-size"])
def test_numbers_below_one_are_refused(images, option, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper_row.parse_arguments(["--data", str(images), option, "0"])
    assert f"argument {option}: 0: not a whole number of at least 1" in capsys.readouterr().err


def test_one_seed_is_written_as_strict_json_with_its_origin(images, tmp_path, stand_in) -> None:
    code, found = train(images, tmp_path / "out", "--seeds", 1, "--epochs", 1)
    assert code == 0
    assert (found["seeds"], found["errors"]) == ([0], {"plain": [50.0], "dsop": [25.0]})
    assert found["dsop_minus_plain"] == {
        "n": 1,
        "mean": -25.0,
        "half": None,
        "wins": 0,
        "p": None,
    }
    assert found["images_per_second_of_one"] == 100.0
    assert found["export"] == {"bundle": str(tmp_path / "out" / "bundles")}
    date.fromisoformat(found["date"])
    assert found["commit"]
    assert {"machine", "versions"} <= found.keys()


def test_a_failed_training_is_told_and_the_same_command_finishes_it_alone(
    images, tmp_path, stand_in, capsys
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken").touch()
    options = ("--seeds", 2, "--epochs", 1)
    code, found = train(images, out, *options)
    assert (code, found["seeds"]) == (1, [0])
    told = capsys.readouterr().err
    for arm in ("plain", "dsop"):
        log = out / arm / "seed-1.log"
        assert (log.read_text(), f"{log}: exit code 1\n" in told) == ("no memory\n", True)
        assert f"{arm} seed 0 epoch 1: error " in told
    (out / "broken").unlink()
    finished = out / "dsop" / "seed-0" / "history.csv"
    before = finished.read_text()
    code, found = train(images, out, *options)
    assert (code, found["seeds"]) == (0, [0, 1])
    assert finished.read_text() == before  # not trained again
    difference = found["dsop_minus_plain"]
    assert (difference["mean"], difference["half"]) == (-25.0, 0.0)


def test_after_the_minutes_nothing_starts_and_the_row_is_unfinished(
    images, tmp_path, stand_in
) -> None:
    code, found = train(images, tmp_path / "out", "--minutes", 0)
    assert (code, found["seeds"], found["dsop_minus_plain"]) == (1, [], {})
    assert "export" not in found


@pytest.mark.slow
def test_a_stopped_row_goes_on_and_exports_a_proved_network(images, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("--data", images, "--out", out, "--seeds", 1, "--epochs", 2, "--workers", 0)
    options = (*options, "--device", "cpu", "--batch-size", 4)
    assert run(*options, "--minutes", 0.1).returncode in (0, 1)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    found = strict((out / "results.json").read_text())
    assert found["seeds"] == [0]
    assert found["export"]["bundle"]
    assert run(*options).returncode == 0  # nothing is left to train
