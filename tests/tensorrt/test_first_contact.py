"""`benchmarks/first_contact.py` on the CPU, and on the stand-in for CUDA."""

import subprocess
import sys
from pathlib import Path

import first_contact
import pytest

from tests.cuda.stand_in import start
from tests.tensorrt.networks import network, write

PROGRAM = str(Path(first_contact.__file__))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a bundle in fp32 and one in fp16."""
    for name, half in (("fp32", False), ("fp16", True)):
        write(tmp_path / "gpu" / name, network(half=half), precision=name)
    return tmp_path / "gpu"


def results(out: Path) -> dict[str, str]:
    """Return the result of each part."""
    return {part: first_contact.read_part(out, part)[1] for part in first_contact.PARTS}


def test_a_killed_part_is_repeated_and_finished_parts_are_not(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "machine.jsonl").write_text(
        '{"what": "device", "value": "H100"}\n{"result": "ok (1.0 s)"}\n'
    )
    (out / "outputs.jsonl").write_text('{"bundle": "tiny fp32"}\n{"bundle": "ti')
    command = [sys.executable, PROGRAM, folder, "--out", out, "machine", "outputs", "tensorrt"]
    done = subprocess.run(
        [*command, "--resume", "--provider", "cpu"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (1, "")
    found = results(out)
    assert (found["machine"], found["outputs"][:4], found["server"]) == (
        "ok (1.0 s)",
        "ok (",
        "",
    )
    assert found["tensorrt"].startswith("failed: tiny fp")

    page = (out / "gpu.md").read_text()
    assert "| device | H100 |" in page
    assert page.count("| tiny fp") == 4  # outputs, and the errors of tensorrt


def test_a_part_for_which_no_time_is_left_is_stopped_and_named(
    folder: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        PROGRAM,
        folder,
        "--out",
        tmp_path / "out",
        "--minutes",
        "0",
        "outputs",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (1, "")
    assert results(tmp_path / "out")["outputs"] == "failed: stopped after 0 s"


def test_each_part_ends_in_one_line_where_cuda_computes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    process = start(PROGRAM, str(folder), "--out", str(tmp_path / "out"))
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 1
    assert [line.partition(": failed: ")[0] for line in lines] == list(first_contact.PARTS)
    assert all(len(text) < 1100 for text in results(tmp_path / "out").values())
