"""The stages of `make gpu-check`: the driver, and what runs on the simulated GPU."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_bundles
import gpu_check
import gpu_speed
import gpu_stages
import numpy as np
import pytest
import torch
from onnx import numpy_helper

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.models.registry import create_model
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import network, write


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    """Return a folder as gpu_bundles.py writes it, with two networks."""
    other = network()
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "fc.weight")
    weight.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(weight)).copy(), "fc.weight"))
    write(tmp_path / "gpu" / "first" / "fp32")
    write(tmp_path / "gpu" / "second" / "fp32", other)
    return tmp_path / "gpu"


def answer(stage: str, bundles: Path, **_: Any) -> dict[str, Any]:
    """Stand in for the process of a stage; `server` fails."""
    return {
        "stage": stage, "passed": stage != "server", "seconds": 1.0, "date": "2026-11-22", "commit": "c" * 40,
        "machine": {"cores": 2}, "versions": {}, "text": f"text of {stage}", "gpu": "Fake H200", "tables": [],
    }  # fmt: skip


def check(monkeypatch: pytest.MonkeyPatch, bundles: Path, out: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(bundles), "--out", str(out), *options])
    return gpu_check.main()


def test_a_failed_stage_does_not_prevent_the_others_and_only_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []
    monkeypatch.setattr(gpu_check, "commit", lambda: "c" * 40)
    monkeypatch.setattr(
        gpu_check, "run_stage", lambda stage, *args, **kw: called.append(stage) or answer(stage, *args, **kw)
    )
    assert check(monkeypatch, tmp_path, tmp_path / "out") == 1
    assert called == list(gpu_check.STAGES)
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "| server | failed: text of server | 1.0 | Fake H200 | 2026-11-22 | cccccccccccc |" in page
    printed = tmp_path / "printed"
    printed.write_text("a line of a library\n" + capsys.readouterr().out)
    assert check(monkeypatch, tmp_path, tmp_path / "out") == 1
    assert called[len(gpu_check.STAGES) :] == ["server"]
    assert "ok   cuda-fp32: done before" in capsys.readouterr().err
    assert check(monkeypatch, tmp_path, tmp_path / "other", "--resume", str(printed)) == 1
    assert called[len(gpu_check.STAGES) + 1 :] == ["server"]


STAGE = """
import json, pathlib, sys, time
for n in range(40):
    print("line", n, file=sys.stderr)
for batch in (1, 2):
    print(json.dumps({"title": "t", "about": "a", "columns": ["batch"], "row": [batch]}), flush=True)
if sys.argv[1] == "server":
    pathlib.Path(sys.argv[2], "rows are printed").touch()
    time.sleep(600)
sys.exit(1)
"""


class TimerOfTheTest(threading.Timer):
    """Ends when the stage of the folder has printed its rows, whatever time it was given."""

    folder: Path

    def run(self) -> None:
        while not self.finished.wait(0.01):
            if (self.folder / "rows are printed").exists():
                self.function()
                return


@pytest.mark.parametrize(("stage", "text"), [("speed", "line 39"), ("server", "not finished after 2 s")])
def test_a_stage_that_fails_keeps_its_rows_and_the_last_lines_of_its_log(
    stage: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_stages.py").write_text(STAGE)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(TimerOfTheTest, "folder", tmp_path, raising=False)
    monkeypatch.setattr(threading, "Timer", TimerOfTheTest)
    monkeypatch.setenv("PATH", "")  # without git, the result is kept, too
    result = gpu_check.run_stage(stage, tmp_path, quick=True, seconds=2)
    assert (result["passed"], result["text"], result["commit"]) == (False, text, "unknown")
    assert [table["rows"] for table in result["tables"]] == [[[1], [2]]]
    assert result["log"] == [f"line {n}" for n in range(10, 40)]


def test_what_a_machine_lacks_is_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    lines = gpu_check.preconditions()
    assert {"missing: git", "missing: make"} <= set(lines)
    assert all(line.startswith(("found: ", "missing: ", "too old: ")) for line in lines)


def test_a_stage_on_cuda_names_each_network_that_fails(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = SimpleNamespace(deviation={"logits": 1.0}, tolerance={"logits": 2.0})

    def load(path: Path, _: object) -> SimpleNamespace:
        if path.parents[1].name == "first":
            raise RuntimeUnavailableError("no kernel")
        return SimpleNamespace(
            runtime=SimpleNamespace(close=lambda: None, name="onnxruntime 1"), replays={1: replay}
        )

    monkeypatch.setattr(gpu_stages, "load_model", load)
    found = r"^1 of 2 fail: tiny-\w+: no kernel; passed: tiny-\w+: probes deviate by 0.50 at batch 1 of their"
    with pytest.raises(gpu_stages.CheckFailedError, match=found):
        gpu_stages.check_cuda(bundles, "fp32")


def test_the_carried_networks_are_one_of_each_family_and_small() -> None:
    """Weights are in the checkpoint, the program and three graphs: 4 + 4 + 4 + 2 + 1 bytes each."""
    with torch.device("meta"):
        networks = [create_model(case.name, num_classes=10, **case.config) for case in gpu_bundles.CARRIED]
    families = {case.name.partition("-")[0] for case in gpu_bundles.CARRIED}
    assert families == {"dsop", "isqrt", "gsop", "gmsop", "efficientnet"}
    weights = sum(weight.numel() for network in networks for weight in network.parameters())
    assert 15 * weights < 17 << 20  # the other files take 2.5 MiB


def test_the_engine_stage_replays_the_probes(install: Callable[..., FakeTensorRT], bundles: Path) -> None:
    install()
    assert "deviate by 0.00 at batch 1" in gpu_stages.check_tensorrt(bundles)


def test_the_server_stage_swaps_two_bundles(
    install: Callable[..., FakeTensorRT], bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setattr(gpu_stages, "SWAPS", 5)
    monkeypatch.setattr(gpu_stages, "has_tensorrt", lambda: True)
    expected = "5 swaps of two bundles under requests on tensorrt: equal answers, 0 MiB of GPU memory lost"
    assert gpu_stages.check_server(bundles) == expected
    first = gpu_stages.bundles_in(bundles)[0]
    monkeypatch.setattr(gpu_stages, "bundles_in", lambda _: [first, first])
    with pytest.raises(gpu_stages.CheckFailedError, match="a swap did not load the other bundle"):
        gpu_stages.check_server(bundles)


def test_the_stage_of_the_tests_fails_if_all_of_them_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = iter(["4 skipped in 3.14s", "3 passed, 1 skipped in 9.00s"])
    done = lambda *_, **__: SimpleNamespace(returncode=0, stdout=next(outputs), stderr="")  # noqa: E731
    monkeypatch.setattr(gpu_stages.subprocess, "run", done)
    with pytest.raises(gpu_stages.CheckFailedError, match="tests/gpu: 4 skipped in"):
        gpu_stages.check_tests(Path())
    assert gpu_stages.check_tests(Path()) == "tests/gpu: 3 passed, 1 skipped in 9.00s"


def test_without_cuda_in_torch_the_speed_of_onnxruntime_is_measured(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = gpu_stages.bundles_in(bundles)[0]
    monkeypatch.setattr(gpu_speed, "CudaOnnxRuntime", lambda bundle: OnnxRuntime(bundle, threads=1))
    rows = [*gpu_speed.speed_rows(bundle, 2, with_tensorrt=False)]
    assert [row["row"][0] for row in rows] == [1, 5, 8, 20, 32]
    assert rows[0]["columns"] == ["batch", "onnxruntime CUDA"]
    assert "torch does not run here: " in rows[0]["about"]
