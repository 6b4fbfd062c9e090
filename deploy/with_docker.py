"""Docker and its daemon; the base image is the Dockerfile's own."""

import json
import subprocess
from pathlib import Path
from typing import Any

from commands import run
from images import ROOT, STOP_SECONDS, Builder, exit_and_output, secrets, uid


class Docker(Builder):
    """Docker and its daemon; the base image is the Dockerfile's own."""

    container = "sopdeploy-check"
    base = next(
        line.partition("=")[2]
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("ARG PYTHON_IMAGE=")
    )

    def prepare(self) -> None:  # noqa: D102
        if exit_and_output(["docker", "image", "inspect", self.base])[0] != 0:
            run("docker", "pull", "--quiet", self.base)

    def build(self, source: Path) -> None:  # noqa: D102
        run("docker", "build", *secrets(), "--target=cpu", f"--tag={self.image}", source)

    def save(self, path: Path) -> None:  # noqa: D102
        run("docker", "save", f"--output={path}", self.image)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return dict(json.loads(run("docker", "image", "inspect", self.image))[0]["Config"])

    def added_bytes(self) -> int:  # noqa: D102
        sizes = [
            run("docker", "image", "inspect", "--format={{.Size}}", name) for name in (self.image, self.base)
        ]
        return int(sizes[0]) - int(sizes[1])

    def start(self, bundles: Path, port: int) -> None:  # noqa: D102
        mount = f"--volume={bundles}:/models:ro"
        safe = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        where = ["--env=SOPDEPLOY_PORT=" + str(port), f"--publish=127.0.0.1:{port}:{port}"]
        run("docker", "run", "--detach", f"--name={self.container}", *safe, mount, *where, self.image)

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
