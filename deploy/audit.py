"""`make audit`: check every entry of deploy/lock/ for known vulnerabilities.

Fails if an entry has one, or was not audited. pip-audit alone succeeds without entries that the
database does not contain, and without those for other machines, such as numpy for the Python of
the image. With `--allow-no-database` it succeeds if the database cannot be used, and says that
nothing was audited.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).parent / "lock"
OPTIONS = ["--progress-spinner=off", "--format=json", "--disable-pip", "--no-deps"]
PIP_AUDIT = [sys.executable, "-m", "pip_audit", *OPTIONS]
ENTRY = re.compile(r"([\w.-]+)(?:\[.*?\])?==([^\s;]+)")
# Has published vulnerabilities. A database without them, such as a mirror of the index, knows
# none at all.
CONTROL = "requests==2.19.0"


def locked() -> list[tuple[str, str]]:
    """List the entries of all lock files, as `name==version` if they have one, each with the file's name."""
    lines = [
        (path.stem, line)
        for path in sorted(LOCKS.glob("*.txt"))
        for line in path.read_text().splitlines()
    ]
    found = [
        (lock, line, ENTRY.match(line)) for lock, line in lines if re.match(r"[^\s#-]", line)
    ]
    return [(lock, f"{entry[1]}=={entry[2]}" if entry else line) for lock, line, entry in found]


def ask(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return pip-audit's answers for *entries* of different packages; if it fails, its last line for each."""
    # Audit the entries in a file.
    entries = list(entries)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(entries))
        file.flush()
        done = subprocess.run(
            [*PIP_AUDIT, "-r", file.name], capture_output=True, text=True, check=False
        )

    # Without answers, its last line says why.
    try:
        answers = {each["name"]: each for each in json.loads(done.stdout)["dependencies"]}
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["pip-audit has no output"]
        return {entry: {"skip_reason": lines[-1]} for entry in entries}

    missing = {"skip_reason": "pip-audit does not mention it"}
    return {entry: answers.get(entry.partition("==")[0], missing) for entry in entries}


def ask_all(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return pip-audit's answers for *entries*; it accepts one version of a package in a call."""
    answers: dict[str, dict[str, Any]] = {}
    left = {entry for entry in entries if ENTRY.fullmatch(entry)}
    while left:
        call = {entry.partition("==")[0]: entry for entry in sorted(left)}
        answers |= ask(call.values())
        left -= set(call.values())
    return answers


def main() -> None:
    """Print what was found and how many entries were audited; exit with 1 unless all are without fault.

    With `--allow-no-database`, a database that knows no vulnerability is not a failure.
    """
    # See whether the database knows the vulnerabilities of the control.
    entries = locked()
    control = ask([CONTROL])[CONTROL]
    if not control.get("vulns"):
        reason = control.get("skip_reason", "it has no vulnerabilities")
        text = f"nothing was audited of {len(entries)} entries in deploy/lock/: the advisory database"
        text += f" has none for {CONTROL} ({reason}); audit where it can be reached"
        if "--allow-no-database" in sys.argv[1:]:
            sys.stdout.write(f"audit: {text}\n")
            return
        sys.exit(f"audit: {text}")

    # Print what is wrong with each entry, and count.
    answers = ask_all(entry for _, entry in entries)
    audited = vulnerable = 0
    for lock, entry in entries:
        answer = answers.get(entry, {"skip_reason": "it names no version"})
        vulnerabilities = [
            f"{each['id']}, fixed in {' '.join(each['fix_versions'])}"
            for each in answer.get("vulns", ())
        ]
        audited += "vulns" in answer
        vulnerable += bool(vulnerabilities)

        reasons = vulnerabilities
        if "vulns" not in answer:
            reasons = [f"not audited: {answer['skip_reason']}"]
        sys.stdout.writelines(f"{lock}.txt: {entry}: {reason}\n" for reason in reasons)

    text = f"{audited} of {len(entries)} entries in deploy/lock/ were audited, {vulnerable} are vulnerable"
    if vulnerable or audited < len(entries):
        sys.exit(
            f"audit: {text}; update what is vulnerable with `make lock`, repeat for what was not audited"
        )
    sys.stdout.write(f"audit: {text}\n")


if __name__ == "__main__":
    main()
