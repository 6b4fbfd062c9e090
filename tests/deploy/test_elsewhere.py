"""`make elsewhere` names the surroundings on which a failing test depends."""

import sys
from dataclasses import replace
from pathlib import Path

import elsewhere
import pytest
from elsewhere import JOURNEYS, Process, Surroundings, UnavailableError, travel, variables

SUITE = """
import os


def test_passes():
    assert True


def test_needs_the_zone():
    assert os.environ.get("PLACE") is None


def test_needs_the_option(request):
    assert request.config.getoption("tbstyle") != "short"


def test_needs_both():
    assert "PLACE" not in os.environ or "OTHER" not in os.environ
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a project with three tests; the program runs those instead of its own."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(SUITE, encoding="utf-8")
    monkeypatch.setattr(elsewhere, "Process", lambda: Process(tmp_path, Path(sys.executable)))
    monkeypatch.setattr(elsewhere, "PARALLEL", ())
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


def missing(*_: object) -> Process:
    raise UnavailableError("not here")


def test_a_failure_is_attributed_to_one_of_the_surroundings_or_to_all_together(
    suite: Path,
) -> None:
    surroundings = [
        variables("there", PLACE="there"),
        variables("other", OTHER="other"),
        Surroundings("option", lambda process, _: replace(process, options=["--tb=short"])),
        Surroundings("none", missing),
    ]
    rows = travel("name", surroundings, lambda _: None)
    assert [row[:2] for row in rows] == [
        ["there", "1 failed: tests/test_one.py::test_needs_the_zone"],
        ["other", "passed (1; 0 not run)"],
        ["option", "1 failed: tests/test_one.py::test_needs_the_option"],
        ["none", "not run: not here"],
        ["together (name)", "1 failed: tests/test_one.py::test_needs_both"],
    ]


def test_a_run_without_a_report_and_files_alone_are_rows(suite: Path) -> None:
    alone = JOURNEYS["alone"]
    assert "1 not run" not in travel("alone", alone, lambda _: None)[0][1]
    (suite / "tests" / "test_one.py").write_text("import missing_module\n", encoding="utf-8")
    assert "failed" in travel("plain", [variables("there", PLACE=None)], lambda _: None)[0][1]


def test_all_surroundings_have_names_of_their_own() -> None:
    names = [one.name for surroundings in JOURNEYS.values() for one in surroundings]
    assert len(set(names)) == len(names)


def test_a_failure_stays_in_the_table_until_its_journey_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elsewhere, "git", lambda *_: "")
    small, offline = (
        [[one.name, "passed", ""] for one in JOURNEYS[name]] for name in ("small", "offline")
    )
    failed = ["together (small)", "1 failed: test", ""]
    not_here = [[name, "not run: not here", ""] for name, *_ in small]
    steps = ([*small, failed], offline, not_here, small)
    found, text = [], ""
    for rows in steps:
        text = elsewhere.page(rows, text)
        found.append("| together (small) | 1 failed: test |" in text)
    assert found == [True, True, True, False]
    assert all(f"| {name} |" in text for name, *_ in (*small, *offline))
