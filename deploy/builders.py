"""Build, run and inspect the server image, with Docker or with buildah, which needs no daemon.

`make container-test` runs this module to prepare the base image while .venv is created, so it
uses the standard library only.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import exit_and_output, run

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".container"
TEST_IMAGE = "sopdeploy-check"
CONTAINER = "sopdeploy-check"
SECRETS = {"pip": Path("/etc/pip.conf"), "ca": Path("/etc/ssl/certs/ca-certificates.crt")}
STOP_SECONDS = 60

DEBIAN = (
    "bookworm"  # as the Dockerfile's base image, but with Debian's Python 3.11 instead of 3.12
)
DEBIAN_PACKAGES = "python3,python3-venv,ca-certificates"
UNITS = {"MB": 1e6, "GB": 1e9}  # of the sizes that `buildah images` prints
HARDENING = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
OPEN_FILES = 4096  # buildah's default of 1024 is too low for a thousand connections
# Prints its process ID, which `exec` keeps; without a PID namespace it is also that of the
# host.
PRINT_PID = ["sh", "-c", 'echo "pid $$" && exec "$@"', "sh"]


class Docker:
    """Builds *image* with Docker on the base image of the Dockerfile, and runs one container of it."""

    base = next(
        line.partition("=")[2]
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("ARG PYTHON_IMAGE=")
    )

    def __init__(self, image: str) -> None:
        self.image = image

    def prepare(self) -> None:
        """Download or create the base image."""
        if exit_and_output(["docker", "image", "inspect", self.base])[0] != 0:
            run("docker", "pull", "--quiet", self.base)

    def build(self, source: Path, target: str) -> None:
        """Build *target* of the Dockerfile from the checkout at *source*."""
        run(
            "docker",
            "build",
            *secret_options(),
            f"--target={target}",
            f"--tag={self.image}",
            source,
        )

    def config(self) -> dict[str, Any]:
        """Read the image's configuration, with Docker's keys."""
        return dict(json.loads(run("docker", "image", "inspect", self.image))[0]["Config"])

    def added_bytes(self) -> int:
        """Compute the size of the image minus that of its base."""
        inspect = ["docker", "image", "inspect", "--format={{.Size}}"]
        return int(run(*inspect, self.image)) - int(run(*inspect, self.base))

    def start(self, volumes: Sequence[str], settings: dict[str, str]) -> None:
        """Start the image's own command with *settings* and *volumes*, such as `/srv/bundles:/models:ro`."""
        port = settings["SOPDEPLOY_PORT"]
        network = [f"--publish=127.0.0.1:{port}:{port}", *environment_options(settings)]
        options = [*HARDENING, *volume_options(volumes), *network]
        run("docker", "run", "--detach", f"--name={CONTAINER}", *options, self.image)

    def as_root(self, path: Path, *command: str) -> str:
        """Run *command* of the image as root with *path* as its last argument; return its output."""
        options = ["--rm", "--user=0", f"--entrypoint={command[0]}", f"--volume={path}:/given"]
        return run("docker", "run", *options, self.image, *command[1:], "/given")

    def execute(self, *command: str) -> tuple[int, str]:
        """Run *command* in the container as its user; return exit code and output."""
        return exit_and_output(["docker", "exec", CONTAINER, *command])

    def logs(self) -> str:
        """Read the output of the server."""
        return exit_and_output(["docker", "logs", CONTAINER])[1]

    def server_user(self) -> int:
        """Read the effective user id of the server process."""
        code, status = self.execute("cat", "/proc/1/status")
        return effective_uid(status) if code == 0 else -1

    def wait(self) -> int:
        """Wait until the server ends by itself and return its exit code."""
        return int(run("docker", "wait", CONTAINER))

    def stop(self) -> int:
        """Send SIGTERM to the server and return its exit code."""
        run("docker", "stop", f"--time={STOP_SECONDS}", CONTAINER)
        return self.wait()

    def clean(self) -> None:
        """Remove the container and keep the image."""
        exit_and_output(["docker", "rm", "--force", CONTAINER])


class Buildah:
    """The same with buildah as root, without daemon and registry, with its own storage below *folder*.

    The base image consists of Debian packages, installed by debootstrap.
    """

    base = "localhost/sopdeploy-base:debian"

    def __init__(self, image: str, folder: Path) -> None:
        self.image, self._folder = image, folder
        self._server: subprocess.Popen[str] | None = None
        self._log = folder / "server.log"
        storage = [
            f"--root={folder / 'storage'}",
            f"--runroot={folder / 'run'}",
            "--storage-driver=vfs",
        ]
        self._buildah = ["buildah", *storage]
        os.environ["BUILDAH_ISOLATION"] = "chroot"

    def prepare(self) -> None:  # noqa: D102
        if self.base in run(*self._buildah, "images", "--format={{.Name}}:{{.Tag}}"):
            return
        rootfs = self._folder / "rootfs"
        shutil.rmtree(rootfs, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}", DEBIAN, rootfs)
        shutil.rmtree(rootfs / "var/cache/apt", ignore_errors=True)
        empty = run(*self._buildah, "from", "scratch")
        run(*self._buildah, "add", "--quiet", empty, rootfs, "/")
        run(*self._buildah, "commit", "--quiet", "--rm", empty, self.base)
        shutil.rmtree(rootfs)

    def build(self, source: Path, target: str) -> None:  # noqa: D102
        self.prepare()
        base = f"--build-arg=PYTHON_IMAGE={self.base}"
        options = ["--format=docker", f"--target={target}", base, f"--tag={self.image}"]
        run(*self._buildah, "bud", *secret_options(), *options, source)

    def config(self) -> dict[str, Any]:  # noqa: D102
        inspected = json.loads(run(*self._buildah, "inspect", "--type=image", self.image))
        return dict(inspected["Docker"]["config"])

    def added_bytes(self) -> int:  # noqa: D102
        sizes = []
        for image in (self.image, self.base):
            number, unit = run(*self._buildah, "images", "--format={{.Size}}", image).split()
            sizes.append(int(float(number) * UNITS[unit]))
        return sizes[0] - sizes[1]

    def start(self, volumes: Sequence[str], settings: dict[str, str]) -> None:  # noqa: D102
        # Make the container.
        limit = f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}"
        run(*self._buildah, "from", limit, f"--name={CONTAINER}", self.image)
        run(*self._buildah, "config", *environment_options(settings), CONTAINER)

        # Run the command of the image in it, which prints its process ID first.
        config = self.config()
        command = [*config["Entrypoint"], *config["Cmd"]]  # `buildah run` ignores both
        with self._log.open("w") as log:
            options = volume_options(volumes)
            full_command = [
                *self._buildah,
                "run",
                *options,
                CONTAINER,
                "--",
                *PRINT_PID,
                *command,
            ]
            self._server = subprocess.Popen(full_command, stdout=log, stderr=log, text=True)

    def as_root(self, path: Path, *command: str) -> str:  # noqa: D102
        return run(*command, path)

    def execute(self, *command: str) -> tuple[int, str]:  # noqa: D102
        return exit_and_output([*self._buildah, "run", CONTAINER, "--", *command])

    def logs(self) -> str:  # noqa: D102
        return self._log.read_text().partition("\n")[2]

    def server_user(self) -> int:  # noqa: D102
        return effective_uid(Path(f"/proc/{self._server_pid()}/status").read_text())

    def _server_pid(self) -> int:
        """Read the process ID of the container's main process from the first line of its output.

        Waits for this line; exits if the process ends or is late.
        """
        deadline = time.monotonic() + STOP_SECONDS
        while (
            self._server is not None
            and self._server.poll() is None
            and time.monotonic() < deadline
        ):
            first, ended, _ = self._log.read_text().partition("\n")
            if ended and first.startswith("pid "):
                return int(first.removeprefix("pid "))
            time.sleep(0.1)
        sys.exit(f"container-test: no server is running; its output: {self._log.read_text()}")

    def wait(self) -> int:  # noqa: D102
        if self._server is None:
            sys.exit("container-test: no server was started")
        try:
            return self._server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            sys.exit(
                f"container-test: the server did not end within {STOP_SECONDS} s; see {self._log}"
            )

    def stop(self) -> int:  # noqa: D102
        os.kill(self._server_pid(), signal.SIGTERM)
        return self.wait()

    def clean(self) -> None:  # noqa: D102
        if self._server is not None and self._server.poll() is None:
            os.kill(self._server_pid(), signal.SIGKILL)
            self._server.wait(STOP_SECONDS)
        exit_and_output([*self._buildah, "rm", CONTAINER])


def secret_options() -> list[str]:
    """List the options that give this machine's pip settings and certificates to the build only."""
    return [
        f"--secret=id={name},src={path}" for name, path in SECRETS.items() if path.is_file()
    ]


def volume_options(volumes: Sequence[str]) -> list[str]:
    """List the options that mount *volumes*."""
    return [f"--volume={volume}" for volume in volumes]


def environment_options(settings: dict[str, str]) -> list[str]:
    """List the options that set the environment variables *settings*."""
    return [f"--env={name}={value}" for name, value in settings.items()]


def effective_uid(status: str) -> int:
    """Read the effective user id from the text of `/proc/PID/status`."""
    return int(next(line.split()[2] for line in status.splitlines() if line.startswith("Uid:")))


Builder = Docker | Buildah


def choose_builder(image: str, folder: Path) -> Builder | str:
    """Choose the builder for *image*; return a message with the reason and advice if none works."""
    if shutil.which("docker") and exit_and_output(["docker", "info"])[0] == 0:
        return Docker(image)

    # Without Docker, buildah does, as root.
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        reason = (
            f"{' and '.join(missing)} are not installed" if missing else "buildah requires root"
        )
        advice = "start Docker, or run `apt-get install buildah debootstrap` and retry as root"
        return f"the Docker daemon does not respond and {reason}: {advice}"
    return Buildah(image, folder)


def builder_for_test(target: str) -> Builder:
    """Choose the builder of the test image of *target*; exit with the reason if none works."""
    WORK.mkdir(exist_ok=True)
    builder = choose_builder(f"{TEST_IMAGE}:{target}", WORK)
    if isinstance(builder, str):
        sys.exit(f"container-test: {builder}")
    return builder


if __name__ == "__main__":
    builder_for_test("cpu").prepare()  # the base is that of every target
