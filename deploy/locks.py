"""What deploy/lock/ says: versions of packages, for which machines, with which hashes and licences."""

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
    """One locked package; *marker* is empty where it is for every machine, *hashes* are of its files."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


def read_lock(path: Path) -> list[Locked]:
    """Return the packages of the lock at *path*, in its order; raises `ValueError` where one has no hash."""
    found = []
    for entry in re.split(r"\n(?=\S)", path.read_text(encoding="utf-8").strip()):
        match = ENTRY.match(entry)
        if match is None:
            raise ValueError(f"{path.name}: not a version with hashes: {entry.splitlines()[0]}")
        hashes = tuple(re.findall(r"sha256:(\w{64})", match["hashes"]))
        found.append(Locked(match["name"], match["version"], match["marker"] or "", hashes))
    return found


def read_licences() -> dict[str, list[str]]:
    """Return the licences that each `name==version` declares; a package may declare none."""
    return dict(json.loads(LICENCES.read_text(encoding="utf-8")))
