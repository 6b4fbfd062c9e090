"""An image of the server: what can be done with it, whoever builds and runs it."""

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECRETS = {"pip": Path("/etc/pip.conf"), "ca": Path("/etc/ssl/certs/ca-certificates.crt")}
STOP_SECONDS = 60


def secrets() -> list[str]:
    """Return the options that lend this machine's pip settings and certificates to the build only."""
    return [f"--secret=id={name},src={path}" for name, path in SECRETS.items() if path.is_file()]


class Builder(ABC):
    """Builds the image called *image*, runs one container of it and stops it."""

    base: str  # the image that it is built on, as a sentence names it

    def __init__(self, image: str) -> None:
        self.image = image

    @abstractmethod
    def prepare(self) -> None:
        """Get the base image, where building would only begin with that."""

    @abstractmethod
    def build(self, source: Path) -> None:
        """Build the image from the checkout at *source*."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the image to *path* as `docker load` and `podman load` read it."""

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


def uid(status: str) -> int:
    """Return the effective user id that `/proc/PID/status` shows."""
    return int(next(line.split()[2] for line in status.splitlines() if line.startswith("Uid:")))


def exit_and_output(command: Sequence[str]) -> tuple[int, str]:
    """Run *command*; return its exit code and all that it printed."""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout + found.stderr
