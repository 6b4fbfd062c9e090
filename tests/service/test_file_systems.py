"""Commands and servers on file systems without locks or links."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_commands import promote as promoting
from sopdeploy_commands.classify.output import OutputFolder
from sopdeploy_commands.promote import promote
from tests.sopdeploy.base.test_file_systems import NO_LINKS, NO_LOCKS, failing


def run(folder: Path, _bundle: Path) -> None:
    with OutputFolder(folder / "out").locked():
        (folder / "out" / "rows" / "part-00000.parquet").touch()


def move(folder: Path, bundle: Path) -> None:
    assert promote(bundle, folder / "live", None).reason == "first bundle"
    assert (folder / "live").resolve() == bundle.resolve()


Action = Callable[[Path, Path], None]
NOTED: dict[Action, str] = {run: "second run", move: "one place"}

HELD: dict[Action, str] = {run: "another run .*out"}


@pytest.mark.parametrize("code", NO_LOCKS)
@pytest.mark.parametrize("action", NOTED)
def test_what_is_safe_without_locks_is_done_with_a_note(
    tmp_path: Path, bundle_path: Path, monkeypatch, caplog, action: Action, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    action(tmp_path, bundle_path)
    (line,) = [record.getMessage() for record in caplog.records]

    assert os.strerror(code) in line
    assert NOTED[action] in line


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EWOULDBLOCK])
@pytest.mark.parametrize("action", HELD)
def test_a_lock_that_is_held_is_another_process(
    tmp_path: Path, bundle_path, monkeypatch, action, code
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with pytest.raises(ConfigError, match=HELD[action]):
        action(tmp_path, bundle_path)


@pytest.mark.parametrize("code", NO_LINKS)
def test_a_link_that_servers_follow_is_needed(
    tmp_path: Path, bundle_path, monkeypatch, code: int
) -> None:
    monkeypatch.setattr(os, "symlink", failing(code))

    with pytest.raises(SopdeployError, match=os.strerror(code)):
        promote(bundle_path, tmp_path / "live", None)
    assert (tmp_path / promoting.LOG).read_bytes() == b""
