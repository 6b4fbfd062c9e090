"""Write deploy/lock/licences.json, the declared licenses of the locked packages; part of `make lock`.

A lock is for Linux and Windows, so the metadata is read for both platforms. A release then needs no network
for the licenses, and its bill of materials does not depend on the machine.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

from locks import FOLDER, LICENCES, read_lock

LOCKS = ("cpu", "gpu")
PLATFORMS = (("x86_64-manylinux_2_28", "3.11"), ("x86_64-pc-windows-msvc", "3.12"))
MAX_NAME_LENGTH = 60  # a longer field contains the license text


def declared_licences(package: Distribution) -> list[str]:
    """Read the SPDX expression of *package*, or its license classifiers, or its license field."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return [expression]
    classifiers = metadata.get_all("Classifier") or []
    names = [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    field = metadata.get("License", "").strip()
    return sorted(names) or ([field] if 0 < len(field) <= MAX_NAME_LENGTH and "\n" not in field else [])


def read_metadata(lock: Path, platform: str, python: str) -> dict[str, list[str]]:
    """Install *lock* for *platform* and *python* temporarily; return the licenses by `name==version`."""
    uv = Path(sys.executable).with_name("uv")
    target = ["--python-platform", platform, "--python-version", python, "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", folder, *target, "-r", lock]
        subprocess.run(command, check=True)
        packages = {
            package.name.lower().replace("_", "-"): package for package in distributions(path=[folder])
        }
        return {
            f"{name}=={package.version}": declared_licences(package) for name, package in packages.items()
        }


def main() -> None:
    """Write the file; exit if no platform provides the metadata of a locked package."""
    found: dict[str, list[str]] = {}
    wanted = set()
    for name in LOCKS:
        lock = FOLDER / f"{name}.txt"
        wanted |= {f"{locked.name}=={locked.version}" for locked in read_lock(lock)}
        for platform, python in PLATFORMS:
            if wanted - set(found):  # otherwise a platform would download CUDA for nothing
                found |= read_metadata(lock, platform, python)
    if missing := wanted - set(found):
        sys.exit(f"no metadata for {', '.join(sorted(missing))}")
    LICENCES.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
