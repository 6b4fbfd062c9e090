"""The capacity command: its output and exit codes."""

import json
import re
import sys
from typing import Any

import capacity
import pytest

ENGINE = ["--engine", "20,2", "--decode-ms", "2.6", "--loop-ms", "0.46"]
ASKED = [*ENGINE, "--rate", "900", "--p99-ms", "150", "--images", "6000"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["capacity.py", *words])
    return capacity.main()


def test_a_plan_is_simulated_every_way_and_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *ASKED, "--json") == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said.keys() == {"machine", "versions", "results"}
    compared = [one["case"] for one in said["results"] if one["against"] == "model"]
    strategies = dict.fromkeys(re.search(r", (.*):", case)[1] for case in compared)  # type: ignore[index]
    assert list(strategies) == [*capacity.ROUTES, "one lost"]
    values = {one["case"]: one["ours"] for one in said["results"]}
    assert values["900 images/s: replicas"] == 4


def test_a_model_that_is_off_ends_with_1_and_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capacity, "BOUND", 1e-6)
    assert run(monkeypatch, *ASKED) == 1
    assert "| random | 4 |" in (said := capsys.readouterr().out)
    assert "**off**" in said


def test_replicas_that_refuse_what_the_plan_promises_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *ASKED, "--queue-size", "12") == 1
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
    ("words", "said"),
    [
        ([*ENGINE, "--p99-ms", "20"], "an image alone takes 25.1 ms"),
        ([*ENGINE, "--p99-ms", "150", "--headroom", "1"], "--headroom is below 1"),
        ([*ENGINE, "--p99-ms", "150", "--rate", "0"], "every --rate above 0"),
        ([*ENGINE, "--p99-ms", "150", "--rate", "-5"], "argument --rate"),
        ([*ENGINE, "--p99-ms", "150", "--engine", "20"], "--engine takes two numbers"),
        ([*ENGINE, "--p99-ms", "150", "--engine", "0,0"], "--engine takes two numbers"),
        ([*ENGINE, "--p99-ms", "nan"], "argument --p99-ms"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
