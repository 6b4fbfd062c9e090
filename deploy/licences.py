"""`make lock` writes deploy/lock/licences.json with this: the licences that the locked packages declare.

Their metadata is read from the packages, once for Linux and once for Windows, because a lock is for both. A
release then needs no network to know them, and says the same wherever it is made.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

from locks import FOLDER, LICENCES, read_lock

LOCKS = ("cpu", "gpu")
MACHINES = (("x86_64-manylinux_2_28", "3.11"), ("x86_64-pc-windows-msvc", "3.12"))
LONGEST = 60  # what is longer is the text of a licence, not its name


def declared(package: Distribution) -> list[str]:
    """Return the licences of *package*: its SPDX expression, or its classifiers, or its field."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return [expression]
    classifiers = metadata.get_all("Classifier") or []
    names = [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    field = metadata.get("License", "").strip()
    return sorted(names) or ([field] if 0 < len(field) <= LONGEST and "\n" not in field else [])


def unpacked(lock: Path, platform: str, python: str) -> dict[str, list[str]]:
    """Return the licences of what *lock* installs for *python* on *platform*, by `name==version`."""
    uv = Path(sys.executable).with_name("uv")
    machine = ["--python-platform", platform, "--python-version", python, "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", folder, *machine, "-r", lock]
        subprocess.run(command, check=True)
        found = {package.name.lower().replace("_", "-"): package for package in distributions(path=[folder])}
        return {f"{name}=={package.version}": declared(package) for name, package in found.items()}


def main() -> None:
    """Write the file; end where a locked package was on neither machine."""
    found: dict[str, list[str]] = {}
    wanted = set()
    for name in LOCKS:
        lock = FOLDER / f"{name}.txt"
        wanted |= {f"{locked.name}=={locked.version}" for locked in read_lock(lock)}
        for platform, python in MACHINES:
            found |= unpacked(lock, platform, python)
    if missing := wanted - set(found):
        sys.exit(f"no metadata of {', '.join(sorted(missing))}")
    LICENCES.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
