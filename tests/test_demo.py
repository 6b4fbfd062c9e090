"""The README's first command without photographs, as a new user types it."""

import subprocess
import sys
from pathlib import Path


def test_the_demo_trains_exports_verifies_serves_and_classifies(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sopdeploy", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out digits classified correctly over HTTP" in done.stdout
    assert "Next: use your own photos" in done.stdout
