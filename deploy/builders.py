"""What can build and run an image here: Docker with its daemon, or buildah, which needs none.

As a program it gets the base image, while `make container-test` fills .venv: it needs nothing but Python.
"""

import os
import shutil
import sys
from pathlib import Path

from images import ROOT, Builder, exit_and_output
from with_buildah import Buildah
from with_docker import Docker

CHECKED = "sopdeploy-check:cpu"
WORK = ROOT / ".container"


def choose_builder(image: str, folder: Path) -> Builder | str:
    """Return what builds *image* here, with *folder* to work in, or why nothing does and what to do."""
    if shutil.which("docker") and exit_and_output(["docker", "info"])[0] == 0:
        return Docker(image)
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        return (
            "no Docker daemon answers, and "
            + (f"{' and '.join(missing)} are not installed" if missing else "buildah needs root here")
            + ": start Docker, or `apt-get install buildah debootstrap` and run this as root"
        )
    return Buildah(image, folder)


def builder_for_test() -> Builder:
    """Return what builds the image that is tried here; ends with the reason where nothing does."""
    WORK.mkdir(exist_ok=True)
    builder = choose_builder(CHECKED, WORK)
    if isinstance(builder, str):
        sys.exit(f"container-test: {builder}")
    return builder


if __name__ == "__main__":
    builder_for_test().prepare()
