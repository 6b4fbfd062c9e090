"""The capacity command: its output and exit codes."""

import json
import re
import sys
from typing import Any

import capacity
import pytest

ENGINE = ["--engine", "20,2", "--decode-ms", "2.6", "--loop-ms", "0.46"]
LOCK = ["--decode-lock-ms", "0.2", "--batch-lock-ms", "0.02", "--front-ends"]
ARGUMENTS = [*ENGINE, "--rate", "900", "--p99-ms", "150", "--images", "6000"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["capacity.py", *words])
    return capacity.main()


@pytest.mark.parametrize("front_ends", ["1", "2"])
def test_a_plan_holds_in_all_simulations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], front_ends: str
) -> None:
    assert run(monkeypatch, *ARGUMENTS, *LOCK, front_ends, "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document.keys() == {"machine", "versions", "results"}
    compared = [one["case"] for one in document["results"] if one["against"] == "model"]
    strategies = dict.fromkeys(re.search(r", (.*):", case)[1] for case in compared)  # type: ignore[index]
    assert list(strategies) == [*capacity.ROUTES, "one lost"]
    values = {one["case"]: one["ours"] for one in document["results"]}
    assert values["900 images/s: replicas"] == 4


def test_a_deviation_of_the_model_is_marked_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capacity, "BOUND", 1e-6)
    assert run(monkeypatch, *ARGUMENTS) == 1
    output = capsys.readouterr().out
    assert "| random | 4 |" in output
    assert "**off**" in output


def test_rejected_images_of_a_plan_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *ARGUMENTS, "--queue-size", "12") == 1
    simulated = re.findall(r"^\| 900 \|.*\| (\d+) \| \d+ \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    assert simulated
    assert all(int(refused) for refused, verdict in simulated if verdict)


def test_without_a_simulation_only_the_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *ENGINE, "--rate", "100,2000", "--p99-ms", "150", "--images", "0") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [text.split(" | ")[0] for text in printed[3:]] == ["| 100", "| 2,000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*ENGINE, "--p99-ms", "20"], "an image takes 25.1 ms without waiting"),
        ([*ENGINE, "--p99-ms", "150", "--headroom", "1"], "--headroom must be below 1"),
        ([*ENGINE, "--p99-ms", "150", "--rate", "0"], "every --rate above 0"),
        ([*ENGINE, "--p99-ms", "150", "--rate", "-5"], "argument --rate"),
        ([*ENGINE, "--p99-ms", "150", "--engine", "20"], "--engine takes two numbers"),
        ([*ENGINE, "--p99-ms", "150", "--engine", "0,0"], "--engine takes two numbers"),
        ([*ENGINE, "--p99-ms", "nan"], "argument --p99-ms"),
        ([*ENGINE, "--p99-ms", "150", "--decode-lock-ms", "3"], "a part of --decode-ms"),
        ([*ENGINE, "--p99-ms", "150", "--front-ends", "0"], "--front-ends must be at least 1"),
    ],
)
def test_an_impossible_plan_is_rejected_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
