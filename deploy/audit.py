"""`make audit`: check the packages in deploy/lock/ for known vulnerabilities.

pip-audit exits with 0 if a service knows none of the packages, reports an unreachable service with the exit
code of a vulnerability, and skips packages for other platforms. Therefore this program passes it every locked
version and reads its report. A package counts as audited if at least one service knows it; the others are
reported on one line.

Exits with 1 for a known vulnerability or if pip-audit fails, otherwise with 0.
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
UNREACHABLE = re.compile(
    r"ConnectionError|Timeout|SSLError|ProxyError|ServiceError|JSONDecodeError|Could not connect|redirecting"
)
SHOWN_NAMES = 5


class Response(NamedTuple):
    """Vulnerabilities of each known `name==version`, and why other packages are unknown (or empty)."""

    known: dict[str, list[str]]
    reason: str


def locked_packages() -> dict[str, Locked]:
    """Read the packages of all locks by `name==version`."""
    locks = sorted(FOLDER.glob("*.txt"))
    return {f"{locked.name}=={locked.version}": locked for lock in locks for locked in read_lock(lock)}


def without_repeated_names(packages: Iterable[Locked]) -> list[list[Locked]]:
    """Split *packages* into lists that contain each name once; pip-audit accepts one version per name."""
    groups: list[dict[str, Locked]] = []
    for package in packages:
        group = next((names for names in groups if package.name not in names), None)
        if group is None:
            groups.append(group := {})
        group[package.name] = package
    return [list(names.values()) for names in groups]


def query(packages: list[Locked], service: str) -> Response:
    """Run pip-audit for *packages* with *service*; exit if pip-audit itself fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "locked.txt"
        lines = [
            " ".join([f"{p.name}=={p.version}", *(f"--hash=sha256:{h}" for h in p.hashes)]) for p in packages
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = ["--vulnerability-service", service, "-r", str(path)]
        command = [sys.executable, "-m", "pip_audit", *OPTIONS, *source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        message = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if not UNREACHABLE.search(done.stderr):
            sys.exit(f"pip-audit failed ({done.returncode}): {message}")
        host = re.search(r"host='([^']+)'", message)
        return Response({}, f"{host[1] if host else service} is unreachable")
    known = {f"{p['name']}=={p['version']}": [v["id"] for v in p["vulns"]] for p in report if "vulns" in p}
    return Response(known, "" if len(known) == len(packages) else f"{service} does not know them")


def audit(packages: dict[str, Locked]) -> tuple[dict[str, list[str]], list[str]]:
    """Query all services; return vulnerabilities by `name==version` and the reasons for unknown packages."""
    known: dict[str, list[str]] = {}
    reasons: list[str] = []
    for service in SERVICES:
        unknown = [package for name, package in packages.items() if name not in known]
        for group in without_repeated_names(unknown):
            response = query(group, service)
            known |= response.known
            if response.reason and response.reason not in reasons:
                reasons.append(response.reason)
    return known, reasons


def main() -> None:
    """Audit all locks; print vulnerable packages, and packages that no service knows."""
    packages = locked_packages()
    known, reasons = audit(packages)
    vulnerable = {name: sorted(found) for name, found in sorted(known.items()) if found}
    for name, found in vulnerable.items():
        sys.stdout.write(f"{name} is vulnerable: {', '.join(found)}\n")
    unknown = [name for name in packages if name not in known]
    if unknown:
        names = ", ".join(unknown[:SHOWN_NAMES]) + (", ..." if unknown[SHOWN_NAMES:] else "")
        why = "; ".join(reasons)
        sys.stdout.write(f"NOT audited: {len(unknown)} of {len(packages)} locked packages ({names}): {why}\n")
    if known:
        sys.stdout.write(f"audited {len(known)} locked packages, {len(vulnerable) or 'none'} vulnerable\n")
    sys.exit(1 if vulnerable else 0)


if __name__ == "__main__":
    main()
