"""The container's main process is signalled and inspected, however many processes are around it."""

import os
import sys
import time
from pathlib import Path

import container_test
import pytest
from builders import HARDENING, Buildah
from container_test import documented_run, values

from sopdeploy_service.settings import VARIABLE_PREFIX, Settings

# Starts a child, as the server does, and ends with 0 after SIGTERM.
SERVER = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(*_):
    child.kill()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
# `buildah run` with the container's command below as many processes as DEPTH says.
STAND_IN = f"""
import json, os, subprocess, sys
if "inspect" in sys.argv:
    command = {{"Entrypoint": [sys.executable, "-c"], "Cmd": [{SERVER!r}]}}
    print(json.dumps({{"Docker": {{"config": command}}}}))
if "run" in sys.argv:
    command = sys.argv[sys.argv.index("--") + 1:]
    wait = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    for _ in range(int(os.environ["DEPTH"])):
        command = [sys.executable, "-c", wait, *command]
    sys.exit(subprocess.call(command))
"""


@pytest.mark.parametrize("depth", [0, 2])
def test_the_main_process_of_a_container_is_stopped(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not `#!` and the path of Python, which may contain spaces.
    (tmp_path / "buildah.py").write_text(STAND_IN)
    (tmp_path / "buildah").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/buildah.py" "$@"\n'
    )
    (tmp_path / "buildah").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DEPTH", str(depth))
    monkeypatch.setenv("BUILDAH_ISOLATION", "chroot")
    builder = Buildah("image", tmp_path)
    builder.start([], {})
    while builder.logs() != "ready\n":
        time.sleep(0.01)
    assert builder.server_user() == os.geteuid()
    assert builder.stop() == 0
    with pytest.raises(SystemExit, match="no server is running; its output: pid"):
        builder.stop()
    builder.clean()


def test_the_bundle_of_an_interrupted_export_is_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundles").mkdir()
    commands: list[str] = []

    def sopdeploy(*arguments: str) -> str:
        commands.append(arguments[0])
        (tmp_path / "bundles" / "latest").mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(container_test, "WORK", tmp_path)
    monkeypatch.setattr(container_test, "sopdeploy", sopdeploy)
    for _ in range(2):
        assert container_test.make_bundle() == tmp_path / "bundles"
    assert commands == ["train", "export"]


def test_the_container_test_runs_the_documented_command_with_keys_and_kept_photographs() -> (
    None
):
    words = documented_run()
    of_docker = ("--publish=", "--volume=", "--env=", "--stop-timeout=")
    assert [word for word in words if not word.startswith(of_docker)] == HARDENING
    (seconds,) = values(words, "stop-timeout")
    assert int(seconds) > Settings().drain_seconds
    targets = {volume.split(":")[1] for volume in values(words, "volume")}
    settings = dict(word.split("=", 1) for word in values(words, "env"))
    assert targets == {"/models", *settings.values()}
    assert {name.removeprefix(VARIABLE_PREFIX).lower() for name in settings} <= set(
        Settings.model_fields
    )
