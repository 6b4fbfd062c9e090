"""Download the wheels that `make gpu-check` needs on a machine without a package index.

    like-there/bin/python deploy/gpu_wheels.py WHEELS

Run it with a Python that has the packages of that machine. What these lack is downloaded, and
in any case the packages with an upper bound, of which the machine may have a newer version. The
project itself is left out.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

PIP = [sys.executable, "-m", "pip"]
BUILD = ["hatchling", "editables"]
EXTRAS = ("gpu", "gpu-check", "train")
FROM_THERE = ("sopdeploy", "torch", "torchvision")


def bounded() -> list[str]:
    """List the requirements of gpu-check that have an upper bound, except torch's."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [
        project["dependencies"],
        *(project["optional-dependencies"][extra] for extra in EXTRAS),
    ]
    found = [requirement for group in groups for requirement in group if "<" in requirement]
    return [requirement for requirement in found if not requirement.startswith(FROM_THERE)]


def main() -> None:
    """Download what is missing here, and what has an upper bound, to the folder of the command line."""
    # Ask pip what it would install.
    (folder,) = sys.argv[1:]
    report = [*PIP, "install", "--quiet", "--dry-run", "--report", "-", *BUILD, ".[gpu-check]"]
    output = subprocess.run(report, check=True, capture_output=True).stdout
    packages = [each["metadata"] for each in json.loads(output)["install"]]
    missing = {package["name"]: package["version"] for package in packages}

    # Download it.
    exact = [f"{name}=={version}" for name, version in missing.items() if name != "sopdeploy"]
    subprocess.run(
        [*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *exact, *bounded()],
        check=True,
    )


if __name__ == "__main__":
    main()
