"""What can build and run an image here: Docker with its daemon, or buildah, which needs none.

Without a daemon there is no base image either where no registry is reached: buildah then gets one from
`debootstrap`, made of Debian's packages, which has the same Python that the Dockerfile asks for.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGE = "sopdeploy-check:cpu"
DEBIAN = "bookworm"
DEBIAN_PACKAGES = "python3,python3-venv,ca-certificates"
SECRETS = {"pip": Path("/etc/pip.conf"), "ca": Path("/etc/ssl/certs/ca-certificates.crt")}
STOP_SECONDS = 60
OPEN_FILES = 4096  # buildah gives 1024, too few for a thousand connections


def run(*command: str | Path, **options: Any) -> str:
    """Run *command* and return its output; where it fails, print its last lines and end."""
    found = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if found.returncode:
        lines = (found.stdout + found.stderr).splitlines()[-30:]
        sys.exit("\n".join([*lines, f"failed ({found.returncode}): {' '.join(map(str, command))}"]))
    return found.stdout.strip()


def secrets() -> list[str]:
    """Return the options that lend this machine's pip settings and certificates to the build only."""
    return [f"--secret=id={name},src={path}" for name, path in SECRETS.items() if path.is_file()]


class Builder(ABC):
    """Builds the image, runs one container of it and stops it."""

    @abstractmethod
    def build(self) -> None:
        """Build the image `IMAGE` from this checkout."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the image's configuration, with the keys that Docker gives it."""

    @abstractmethod
    def added_bytes(self) -> int:
        """Return by how much the image is larger than its base."""

    @abstractmethod
    def start(self, bundles: Path, port: int) -> None:
        """Start the image's own command, with *bundles* read-only at /models, to answer on *port*."""

    @abstractmethod
    def inside(self, *command: str) -> tuple[int, str]:
        """Run *command* in the container as its user; return exit code and output."""

    @abstractmethod
    def said(self) -> str:
        """Return what the server has printed."""

    @abstractmethod
    def server_user(self) -> int:
        """Return the user id that the server's process has."""

    @abstractmethod
    def stop(self) -> int:
        """Send SIGTERM to the server and return its exit code."""

    @abstractmethod
    def clean(self) -> None:
        """Remove the container; the image stays."""


class Docker(Builder):
    """Docker and its daemon; the base image is the Dockerfile's own."""

    container = "sopdeploy-check"

    def build(self) -> None:  # noqa: D102
        run("docker", "build", *secrets(), "--target=cpu", f"--tag={IMAGE}", ROOT)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return dict(json.loads(run("docker", "image", "inspect", IMAGE))[0]["Config"])

    def added_bytes(self) -> int:  # noqa: D102
        base = next(
            line.partition("=")[2]
            for line in (ROOT / "Dockerfile").read_text().splitlines()
            if line.startswith("ARG PYTHON_IMAGE=")
        )
        sizes = [run("docker", "image", "inspect", "--format={{.Size}}", name) for name in (IMAGE, base)]
        return int(sizes[0]) - int(sizes[1])

    def start(self, bundles: Path, port: int) -> None:  # noqa: D102
        mount = f"--volume={bundles}:/models:ro"
        safe = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        where = ["--env=SOPDEPLOY_PORT=" + str(port), f"--publish=127.0.0.1:{port}:{port}"]
        run("docker", "run", "--detach", f"--name={self.container}", *safe, mount, *where, IMAGE)

    def inside(self, *command: str) -> tuple[int, str]:  # noqa: D102
        return exit_and_output(["docker", "exec", self.container, *command])

    def said(self) -> str:  # noqa: D102
        return exit_and_output(["docker", "logs", self.container])[1]

    def server_user(self) -> int:  # noqa: D102
        code, found = self.inside("cat", "/proc/1/status")
        return uid(found) if code == 0 else -1

    def stop(self) -> int:  # noqa: D102
        run("docker", "stop", f"--time={STOP_SECONDS}", self.container)
        return int(run("docker", "wait", self.container))

    def clean(self) -> None:  # noqa: D102
        subprocess.run(["docker", "rm", "--force", self.container], capture_output=True, check=False)


class Buildah(Builder):
    """buildah as root, without a daemon or a registry, in a storage of its own under *folder*."""

    container = "sopdeploy-check"
    base = "localhost/sopdeploy-base:debian"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None
        self._log = folder / "server.log"
        store = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}", "--storage-driver=vfs"]
        self._buildah = ["buildah", *store]
        os.environ["BUILDAH_ISOLATION"] = "chroot"

    def build(self) -> None:  # noqa: D102
        if self.base not in run(*self._buildah, "images", "--format={{.Name}}:{{.Tag}}"):
            self._make_base()
        base = f"--build-arg=PYTHON_IMAGE={self.base}"
        run(
            *self._buildah, "bud", *secrets(), "--format=docker", "--target=cpu", base, f"--tag={IMAGE}", ROOT
        )

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
        found = json.loads(run(*self._buildah, "inspect", "--type=image", IMAGE))
        return dict(found["Docker"]["config"])

    def added_bytes(self) -> int:  # noqa: D102
        return self._bytes_of(IMAGE) - self._bytes_of(self.base)

    def _bytes_of(self, image: str) -> int:
        container = run(*self._buildah, "from", image)
        size = run("du", "--summarize", "--block-size=1", run(*self._buildah, "mount", container)).split()[0]
        run(*self._buildah, "rm", container)
        return int(size)

    def start(self, bundles: Path, port: int) -> None:  # noqa: D102
        run(
            *self._buildah,
            "from",
            f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}",
            f"--name={self.container}",
            IMAGE,
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


def uid(status: str) -> int:
    """Return the effective user id that `/proc/PID/status` shows."""
    return int(next(line.split()[2] for line in status.splitlines() if line.startswith("Uid:")))


def exit_and_output(command: Sequence[str]) -> tuple[int, str]:
    """Run *command*; return its exit code and all that it printed."""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout + found.stderr


def choose_builder(folder: Path) -> Builder:
    """Return what works here; end with the reason where nothing does, because then nothing was checked."""
    if shutil.which("docker") and exit_and_output(["docker", "info"])[0] == 0:
        return Docker()
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        sys.exit(
            "container-test: no Docker daemon answers, and "
            + (f"{' and '.join(missing)} is not installed" if missing else "buildah needs root here")
            + ": start Docker, or `apt-get install buildah debootstrap` and run this as root"
        )
    return Buildah(folder)
