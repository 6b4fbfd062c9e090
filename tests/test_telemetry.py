"""No command sends or stores usage data: onnxruntime's telemetry is off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.children import PYTHONPATH
from tests.service.conftest import write_bundle

PREDICT = """
import sys
import numpy as np
from pathlib import Path
from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
OnnxRuntime(open_bundle(Path(sys.argv[1])), threads=1).run(np.zeros((1, 32, 32, 3), np.uint8))
"""
EXPORT = """
import sys
import sopdeploy_export  # without torch
import onnxruntime
onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("code", [PREDICT, EXPORT], ids=["service", "exporter"])
def test_running_a_network_writes_nothing_to_the_home_folder(code: str, tmp_path: Path) -> None:
    bundle, home = write_bundle(tmp_path), tmp_path / "home"
    home.mkdir()
    # With CI or without a home folder, onnxruntime keeps no telemetry anyway.
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment = kept | {"HOME": str(home), "PYTHONPATH": PYTHONPATH, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(bundle)], env=environment, check=True)
    assert list(home.rglob("*")) == []
