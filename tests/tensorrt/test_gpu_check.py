"""`make gpu-check` runs against the simulated GPU."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_check
import gpu_speed
import gpu_steps
import pytest

import sopdeploy
from sopdeploy.api.training_result import TrainedRun
from sopdeploy.bundle.folder import Bundle
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT


def test_the_page_lists_the_gpu_and_every_batch_size(
    install: Callable[..., FakeTensorRT], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    out = tmp_path / "out"
    monkeypatch.setattr(gpu_speed, "BATCHES", (1, 8))
    monkeypatch.setattr(gpu_steps, "SWAPS", 5)
    skipped = (
        "cuda",
        "decode-fast",
        "decode-nvimagecodec",
        "training",
    )  # need a GPU, or a network that learned
    assert run(monkeypatch, bundle, out, *skipped) == 0
    assert "Fake H200" in json.dumps(json.loads((out / "gpu.json").read_text()))
    page = (out / "gpu.md").read_text()
    assert "gpu: Fake H200" in page
    rows = dict(line.split(" | ", 1) for line in page.splitlines() if line.startswith("| "))
    assert {f"| {name}" for name in ("1", "8", "tensorrt", "server")} <= set(rows)
    assert [rows[f"| {name}"] for name in skipped] == ["not run |"] * len(skipped)
    assert "CUDA graphs of the profiles 1 and 2" in rows["| tensorrt"]
    assert rows["| server"] == "5 swaps under requests: equal answers, 0 MiB of GPU memory lost |"
    assert "two in flight" in page


def run(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, out: Path, *skipped: str) -> int:
    options = [word for name in skipped for word in ("--skip", name)]
    arguments = ["gpu_check.py", "--quick", "--bundle", str(bundle.path), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    return gpu_check.main()


FAILURES = {
    "graphs that cannot be captured": (
        "cudaGraphInstantiate",
        "of the profiles 1,2,8, none became CUDA graphs",
    ),
    "no GPU": ("cudaGetDeviceCount", "no NVIDIA GPU can be used here"),
    "no CUDA for ONNX Runtime": ("", "onnxruntime .* has no CUDAExecutionProvider here"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_writes_no_page(
    case: str,
    install: Callable[..., FakeTensorRT],
    cuda: FakeCuda,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install()
    function, message = FAILURES[case]
    cuda.broken.add(function)
    cuda.gpus = 0 if function == "cudaGetDeviceCount" else 1
    assert run(monkeypatch, bundle, tmp_path / "out", *(["cuda"] if function else [])) == 1
    assert re.search(f"^gpu-check: .*{message}.*$", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_without_tensorrt_the_other_steps_can_be_run(
    cuda: FakeCuda, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run(monkeypatch, bundle, tmp_path / "out", *gpu_check.STEPS) == 0
    assert "gpu: Fake H200" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_training_run_must_reach_the_required_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for top1, expected in ((0.99, None), (0.94, "94.0% accuracy on CUDA, at least 95% is required")):
        trained = TrainedRun.model_construct(best_top1=top1)
        monkeypatch.setattr(sopdeploy, "train", lambda trained=trained, **_: trained)
        if expected is None:
            assert gpu_steps.check_training(tmp_path) == "digits-dsop on CUDA: 99.0% accuracy"
        else:
            with pytest.raises(gpu_steps.CheckFailedError, match=expected):
                gpu_steps.check_training(tmp_path)
