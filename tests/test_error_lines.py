"""How an error of a verb ends: one line with its code, for a script as JSON; a full disk is an error too."""

import errno
import json
import os

import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.cli.console import one_line_errors, storage_errors
from sopdeploy.errors import StorageError


def test_a_mistake_shows_its_code_and_gives_it_to_a_script() -> None:
    found = CliRunner().invoke(app, ["verify", "nowhere", "--json"])
    assert found.exit_code == 2
    assert found.stderr.endswith(" [unusable_bundle]\n")
    told = json.loads(found.stdout)["error"]
    assert told["code"] == "unusable_bundle"
    assert told["message"] in found.stderr
    assert CliRunner().invoke(app, ["verify", "nowhere"]).stdout == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_a_disk_refuses_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException, match="2"), one_line_errors():
        raise OSError(number, os.strerror(number), "bundles/x")
    line = capsys.readouterr().err
    assert line.startswith(f"error: bundles/x: cannot be read or written ({os.strerror(number)});")
    assert line.endswith("[no_storage]\n")


def test_what_a_disk_refuses_names_no_file_where_the_system_does_not() -> None:
    with pytest.raises(StorageError, match=r"^a file: cannot be read or written \("), storage_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_the_system_that_is_no_disks_is_ours() -> None:
    with pytest.raises(ConnectionResetError), one_line_errors():
        raise ConnectionResetError(errno.ECONNRESET, "reset")
