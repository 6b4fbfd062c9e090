"""buildah, which needs no daemon, on a base of Debian's packages, which needs no registry.

The base has the same Python that the Dockerfile asks for; `debootstrap` makes it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from commands import run
from images import STOP_SECONDS, Builder, exit_and_output, secrets, uid

DEBIAN = "bookworm"
DEBIAN_PACKAGES = "python3,python3-venv,ca-certificates"
UNITS = {"MB": 1e6, "GB": 1e9}  # as buildah writes sizes, which it knows without unpacking a copy
OPEN_FILES = 4096  # buildah gives 1024, too few for a thousand connections


class Buildah(Builder):
    """buildah as root, without a daemon or a registry, in a storage of its own under *folder*."""

    container = "sopdeploy-check"
    base = "localhost/sopdeploy-base:debian"

    def __init__(self, image: str, folder: Path) -> None:
        super().__init__(image)
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None
        self._log = folder / "server.log"
        store = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}", "--storage-driver=vfs"]
        self._buildah = ["buildah", *store]
        os.environ["BUILDAH_ISOLATION"] = "chroot"

    def prepare(self) -> None:  # noqa: D102
        if self.base not in run(*self._buildah, "images", "--format={{.Name}}:{{.Tag}}"):
            self._make_base()

    def build(self, source: Path) -> None:  # noqa: D102
        self.prepare()
        base = f"--build-arg=PYTHON_IMAGE={self.base}"
        what = ["--format=docker", "--target=cpu", base, f"--tag={self.image}"]
        run(*self._buildah, "bud", *secrets(), *what, source)

    def save(self, path: Path) -> None:  # noqa: D102
        run(*self._buildah, "push", "--quiet", self.image, f"docker-archive:{path}:{self.image}")

    def _make_base(self) -> None:
        rootfs = self._folder / "rootfs"
        shutil.rmtree(rootfs, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}", DEBIAN, rootfs)
        shutil.rmtree(rootfs / "var/cache/apt", ignore_errors=True)
        empty = run(*self._buildah, "from", "scratch")
        run(*self._buildah, "add", "--quiet", empty, rootfs, "/")
        run(*self._buildah, "commit", "--quiet", "--rm", empty, self.base)
        shutil.rmtree(rootfs)

    def config(self) -> dict[str, Any]:  # noqa: D102
        found = json.loads(run(*self._buildah, "inspect", "--type=image", self.image))
        return dict(found["Docker"]["config"])

    def added_bytes(self) -> int:  # noqa: D102
        return self._bytes_of(self.image) - self._bytes_of(self.base)

    def _bytes_of(self, image: str) -> int:
        number, unit = run(*self._buildah, "images", "--format={{.Size}}", image).split()
        return int(float(number) * UNITS[unit])

    def start(self, bundles: Path, port: int) -> None:  # noqa: D102
        run(
            *self._buildah,
            "from",
            f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}",
            f"--name={self.container}",
            self.image,
        )
        run(*self._buildah, "config", f"--env=SOPDEPLOY_PORT={port}", self.container)
        config = self.config()
        command = [*config["Entrypoint"], *config["Cmd"]]  # buildah runs what it is told, not these
        mount = f"--volume={bundles}:/models:ro"
        with self._log.open("w") as log:
            told = [*self._buildah, "run", mount, self.container, "--", *command]
            self._server = subprocess.Popen(told, stdout=log, stderr=log, text=True)

    def inside(self, *command: str) -> tuple[int, str]:  # noqa: D102
        return exit_and_output([*self._buildah, "run", self.container, "--", *command])

    def said(self) -> str:  # noqa: D102
        return self._log.read_text()

    def server_user(self) -> int:  # noqa: D102
        return uid(Path(f"/proc/{self._server_pid()}/status").read_text())

    def _server_pid(self) -> int:
        """Return the process below buildah that is the server: with chroot it is one of this machine's."""
        if self._server is None:
            sys.exit("no server was started")
        pid, seen = self._server.pid, time.monotonic()
        while time.monotonic() < seen + STOP_SECONDS:
            threads = Path(f"/proc/{pid}/task").glob("*/children")  # any of Go's threads may be the parent
            below = [child for thread in threads for child in thread.read_text().split()]
            if not below:
                return pid
            pid = int(below[0])
        sys.exit("the server's process was not found")

    def stop(self) -> int:  # noqa: D102
        if self._server is None:
            sys.exit("no server was started")
        os.kill(self._server_pid(), signal.SIGTERM)
        code = self._server.wait(STOP_SECONDS)
        self._server = None
        return code

    def clean(self) -> None:  # noqa: D102
        if self._server is not None and self._server.poll() is None:
            os.kill(self._server_pid(), signal.SIGKILL)
            self._server.wait(STOP_SECONDS)
        removed = [*self._buildah, "rm", self.container]
        subprocess.run(removed, capture_output=True, check=False)
