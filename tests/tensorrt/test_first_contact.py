"""`benchmarks/first_contact.py` on the CPU, and on the stand-in for CUDA."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import first_contact
import pytest

from sopdeploy_service.runtime.onnxruntime import CUDA, cuda_options, session_options
from tests.cuda.stand_in import ABSENT, installed, start
from tests.tensorrt.networks import network, write

PROGRAM = str(Path(first_contact.__file__))
ON_CPU_THREADS = {"intra_op_num_threads", "inter_op_num_threads", "session.intra_op.allow_spinning"}
DEFAULTS = {"graph_optimization_level"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a bundle in fp32 and one in fp16."""
    for name, half in (("fp32", False), ("fp16", True)):
        write(tmp_path / "gpu" / name, network(half=half), precision=name)
    return tmp_path / "gpu"


def results(out: Path) -> dict[str, str]:
    """Return the result of each part."""
    return {part: first_contact.read_part(out, part)[1] for part in first_contact.PARTS}


def test_a_part_that_was_killed_is_repeated_and_those_that_succeeded_are_not(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "machine.jsonl").write_text('{"what": "device", "value": "H100"}\n{"result": "ok (1.0 s)"}\n')
    (out / "probes.jsonl").write_text('{"bundle": "tiny fp32"}\n{"bundle": "ti')
    command = [sys.executable, PROGRAM, folder, "--out", out, "machine", "probes", "tensorrt"]
    done = subprocess.run(
        [*command, "--resume", "--provider", "cpu"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    found = results(out)
    assert (found["machine"], found["probes"][:4], found["server"]) == ("ok (1.0 s)", "ok (", "")
    assert found["tensorrt"].startswith("failed: tiny fp")
    page = (out / "gpu.md").read_text()
    assert "| device | H100 |" in page
    assert page.count("| tiny fp") == 4  # probes, and the errors of tensorrt


def test_a_wrong_result_is_named_and_the_other_bundles_are_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, right = (next(folder.glob(f"{name}/tiny-*")) for name in ("fp32", "fp16"))
    (wrong / "model.onnx").write_bytes((right / "model.onnx").read_bytes()[:-1000])
    first_contact.run_alone("probes", first_contact.read_bundles(folder), "cpu")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert '{"result": "failed: tiny fp32: ' in rows[-1]


class Recorded(SimpleNamespace):
    """Session options that can be listed, in the place of those of ONNX Runtime."""

    def add_session_config_entry(self, name: str, value: str) -> None:
        vars(self)[name] = value


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_session_has_the_options_of_the_service(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def session(_: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback
        opened.extend((options, providers))
        return SimpleNamespace(get_providers=lambda: [CUDA])

    levels = SimpleNamespace(ORT_ENABLE_ALL=99)
    onnxruntime: Any = SimpleNamespace(
        SessionOptions=Recorded,
        InferenceSession=session,
        preload_dlls=lambda: None,
        GraphOptimizationLevel=levels,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    first_contact.open_session({"path": Path("folder"), "precision": precision}, "cuda")
    options, providers = opened
    assert providers == [(CUDA, cuda_options(precision))]
    of_service = vars(session_options(onnxruntime, 1, CUDA))
    profile = {"enable_profiling", "profile_file_prefix"}
    assert {name: value for name, value in vars(options).items() if name not in profile} == {
        name: value for name, value in of_service.items() if name not in ON_CPU_THREADS | DEFAULTS
    }


@pytest.mark.skipif(not installed(), reason=ABSENT)
def test_each_part_ends_in_one_line_where_cuda_computes_nothing(folder: Path, tmp_path: Path) -> None:
    process = start(PROGRAM, str(folder), "--out", str(tmp_path / "out"))
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 1
    assert [line.partition(": failed: ")[0] for line in lines] == list(first_contact.PARTS)
    assert all(len(text) < 1100 for text in results(tmp_path / "out").values())
