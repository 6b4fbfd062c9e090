"""`make gpu-check` runs against the simulated GPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_check
import pytest

from sopdeploy.bundle.folder import Bundle
from tests.tensorrt.fake_tensorrt import FakeTensorRT


def test_the_page_lists_the_gpu_and_every_batch_size(
    install: Callable[..., FakeTensorRT], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    out = tmp_path / "out"
    arguments = ["gpu_check.py", "--quick", "--bundle", str(bundle.path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(gpu_check, "BATCHES", (1, 8))
    assert gpu_check.main() == 0
    assert "Fake H200" in json.dumps(json.loads((out / "engines.json").read_text()))
    page = (out / "engines.md").read_text()
    assert "gpu: Fake H200" in page
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    assert {"1", "8"} <= set(rows)
    assert "two under way" in page
