"""`make audit`: is anything in deploy/lock/ known to be vulnerable? And a line where that could not be asked.

pip-audit ends with 0 where a service knows none of the packages, with the code of a found vulnerability where
no service answers, and passes over what is not for this machine. So it is given every version, its report is
read, and a package counts as audited only where a service answered for it; one service is enough.

Ends with 1 for a known vulnerability or a pip-audit that does not run, otherwise with 0.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from locks import FOLDER, Locked, read_lock

SERVICES = ("osv", "pypi")
OPTIONS = ["--require-hashes", "--disable-pip", "--format=json", "--progress-spinner=off", "--timeout=15"]
NOT_REACHED = re.compile(
    r"ConnectionError|Timeout|SSLError|ProxyError|ServiceError|JSONDecodeError|Could not connect|redirecting"
)
MOST_NAMES = 5


class Answer(NamedTuple):
    """What a service says: the vulnerabilities of each `name==version`, and why it does not know some."""

    known: dict[str, list[str]]
    reason: str


def locked_packages() -> dict[str, Locked]:
    """Return what all locks hold, by `name==version`."""
    locks = sorted(FOLDER.glob("*.txt"))
    return {f"{locked.name}=={locked.version}": locked for lock in locks for locked in read_lock(lock)}


def rounds(packages: Iterable[Locked]) -> list[list[Locked]]:
    """Return *packages* in lists that hold each name once, because pip-audit takes one version of a name."""
    found: list[dict[str, Locked]] = []
    for package in packages:
        free = next((names for names in found if package.name not in names), None)
        if free is None:
            found.append(free := {})
        free[package.name] = package
    return [list(names.values()) for names in found]


def ask(packages: list[Locked], service: str) -> Answer:
    """Let pip-audit ask *service* for *packages*; ends where pip-audit fails by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "locked.txt"
        hashed = [
            " ".join([f"{p.name}=={p.version}", *(f"--hash=sha256:{h}" for h in p.hashes)]) for p in packages
        ]
        path.write_text("\n".join(hashed) + "\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            *OPTIONS,
            "--vulnerability-service",
            service,
            "-r",
            path,
        ]
        found = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    try:
        report = json.loads(found.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if not NOT_REACHED.search(found.stderr):
            sys.exit(f"pip-audit failed ({found.returncode}): {said}")
        host = re.search(r"host='([^']+)'", said)
        return Answer({}, f"{host[1] if host else service} is not reached")
    known = {f"{p['name']}=={p['version']}": [v["id"] for v in p["vulns"]] for p in report if "vulns" in p}
    return Answer(known, "" if len(known) == len(packages) else f"{service} does not know them")


def audit(packages: dict[str, Locked]) -> tuple[dict[str, list[str]], list[str]]:
    """Ask for *packages*; return the vulnerabilities by `name==version`, and why a service left some open."""
    known: dict[str, list[str]] = {}
    reasons: list[str] = []
    for service in SERVICES:
        for part in rounds([package for name, package in packages.items() if name not in known]):
            answer = ask(part, service)
            known |= answer.known
            reasons += [answer.reason] if answer.reason and answer.reason not in reasons else []
    return known, reasons


def main() -> None:
    """Audit every lock and say what was found, and what was not audited and why."""
    packages = locked_packages()
    known, reasons = audit(packages)
    vulnerable = {name: sorted(found) for name, found in sorted(known.items()) if found}
    for name, found in vulnerable.items():
        sys.stdout.write(f"{name} is vulnerable: {', '.join(found)}\n")
    open_ = [name for name in packages if name not in known]
    if open_:
        names = ", ".join(open_[:MOST_NAMES]) + (", ..." if open_[MOST_NAMES:] else "")
        why = "; ".join(reasons)
        sys.stdout.write(f"NOT audited: {len(open_)} of {len(packages)} locked packages ({names}): {why}\n")
    if known:
        sys.stdout.write(f"audited {len(known)} locked packages, {len(vulnerable) or 'none'} vulnerable\n")
    sys.exit(1 if vulnerable else 0)


if __name__ == "__main__":
    main()
