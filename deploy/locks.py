"""Read deploy/lock/: package versions with platform markers, hashes and licenses."""

import json
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "lock"
LICENCES = FOLDER / "licences.json"
ENTRY = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; (?P<marker>[^\\\n]*?))?"
    r"(?P<hashes>(?: \\\n +--hash=sha256:\w{64})+)$"
)


class Locked(NamedTuple):
    """A locked package; *marker* is empty for all platforms, *hashes* are sha256 of its files."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


def read_lock(path: Path) -> list[Locked]:
    """Read the packages of the lock at *path* in order; raises `ValueError` for one without a hash."""
    packages = []
    for entry in re.split(r"\n(?=\S)", path.read_text(encoding="utf-8").strip()):
        match = ENTRY.match(entry)
        if match is None:
            raise ValueError(f"{path.name}: not a version with hashes: {entry.splitlines()[0]}")
        hashes = tuple(re.findall(r"sha256:(\w{64})", match["hashes"]))
        packages.append(Locked(match["name"], match["version"], match["marker"] or "", hashes))
    return packages


def read_licences() -> dict[str, list[str]]:
    """Read the declared licenses by `name==version`; the list may be empty."""
    return dict(json.loads(LICENCES.read_text(encoding="utf-8")))
