"""`make gpu-check` against the pretend GPU: its page can be written on the day that there is a real one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_check
import pytest

from sopdeploy.bundle.folder import Bundle
from tests.tensorrt.fake_tensorrt import FakeTensorRT


def test_its_page_has_every_batch_and_the_rates(
    install: Callable[..., FakeTensorRT], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    out = tmp_path / "out"
    asked = ["gpu_check.py", "--quick", "--bundle", str(bundle.path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.setattr(gpu_check, "BATCHES", (1, 8))
    assert gpu_check.main() == 0
    (case,) = json.loads((out / "engines.json").read_text())["cases"]
    assert [row["batch"] for row in case["milliseconds"]] == [1, 8]
    assert case["images_per_second"]["batch"] == 8
    assert case["from_cache_the_second_time"]
    page = (out / "engines.md").read_text()
    assert "gpu: Fake H200" in page
    assert f"two under way {case['images_per_second']['two under way']}." in page
