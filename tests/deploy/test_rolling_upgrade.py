"""Two versions serve one folder of bundles; here both are the version of this checkout."""

import subprocess
import sys
from pathlib import Path

import pytest
import rolling_upgrade


@pytest.mark.nightly
def test_either_version_moves_the_live_link_and_no_request_fails() -> None:
    program = Path(sys.executable).with_name("sopdeploy")
    command = [sys.executable, rolling_upgrade.__file__, program, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: none" in done.stdout
