"""The audit says how many entries were audited. It succeeds with all, or if told to without a database."""

import json
import sys
from pathlib import Path
from typing import Any

import audit
import pytest

# pip-audit with the answers in the file beside it; without the file, it fails.
STAND_IN = """
import json, pathlib, sys
answers = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())
entries = [line.strip() for line in open(sys.argv[-1])]
names = [entry.partition("==")[0] for entry in entries]
assert len(set(names)) == len(names) and not any(";" in entry for entry in entries)
found = [{"name": name, **answers[entry]} for name, entry in zip(names, entries) if entry in answers]
print(json.dumps({"dependencies": found}))
"""


LOCK = """numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:00
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:01
"""


CLEAN: dict[str, Any] = {"vulns": []}


FAULTY = {"vulns": [{"id": "PYSEC-1", "fix_versions": ["3.0"]}]}


SKIPPED = {"skip_reason": "not on PyPI"}


CONTROL = {audit.CONTROL: FAULTY}


NOTHING = "nothing was audited of 2 entries"


CASES: dict[str, tuple[dict[str, Any] | None, int, list[str]]] = {
    "all clean": (
        CONTROL | {"numpy==2.4.6": CLEAN, "numpy==2.5.5": CLEAN},
        0,
        ["2 of 2 entries in deploy/lock/ were audited, 0 are"],
    ),
    "a vulnerability": (
        CONTROL | {"numpy==2.4.6": CLEAN, "numpy==2.5.5": FAULTY},
        1,
        [
            "cpu.txt: numpy==2.5.5: PYSEC-1, fixed in 3.0",
            "2 of 2 entries in deploy/lock/ were audited, 1 are",
        ],
    ),
    "an entry that is skipped": (
        CONTROL | {"numpy==2.4.6": SKIPPED, "numpy==2.5.5": CLEAN},
        1,
        ["cpu.txt: numpy==2.4.6: not audited: not on PyPI", "1 of 2 entries"],
    ),
    "an entry that is dropped": (
        CONTROL | {"numpy==2.5.5": CLEAN},
        1,
        ["does not mention it", "1 of 2"],
    ),
    "a database without advisories": (
        {audit.CONTROL: CLEAN, "numpy==2.4.6": CLEAN, "numpy==2.5.5": CLEAN},
        -1,
        [NOTHING, "it has no vulnerabilities"],
    ),
    "a mirror without the database": ({audit.CONTROL: SKIPPED}, -1, [NOTHING, "not on PyPI"]),
    "no connection": (None, -1, [NOTHING, "No such file or directory"]),
}


@pytest.mark.parametrize("option", ["", "--allow-no-database"])
@pytest.mark.parametrize("case", CASES)
def test_the_audit_succeeds_only_if_every_entry_was_audited(
    case: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers, code, texts = CASES[case]
    (tmp_path / "cpu.txt").write_text(LOCK)
    (tmp_path / "pip_audit.py").write_text(STAND_IN)
    if answers is not None:
        (tmp_path / "answers.json").write_text(json.dumps(answers))
    monkeypatch.setattr(audit, "LOCKS", tmp_path)
    monkeypatch.setattr(audit, "PIP_AUDIT", [sys.executable, str(tmp_path / "pip_audit.py")])
    monkeypatch.setattr(sys, "argv", ["audit.py", *option.split()])
    ended: object = None

    try:
        audit.main()
    except SystemExit as exit_:
        ended = exit_.code

    without_database = code == -1
    assert (ended is not None) == (not option if without_database else bool(code))

    printed = f"{capsys.readouterr().out}{ended}"
    assert [text for text in texts if text not in printed] == []
