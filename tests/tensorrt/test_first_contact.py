"""`benchmarks/first_contact.py` on the stand-in for CUDA."""

from pathlib import Path

import first_contact
import pytest

from tests.cuda.stand_in import ABSENT, installed, start
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


@pytest.mark.skipif(not installed(), reason=ABSENT)
def test_each_part_ends_in_one_line_where_cuda_computes_nothing(folder: Path, tmp_path: Path) -> None:
    process = start(PROGRAM, str(folder), "--out", str(tmp_path / "out"))
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 1
    assert [line.partition(": failed: ")[0] for line in lines] == list(first_contact.PARTS)
    assert all(len(text) < 1100 for text in results(tmp_path / "out").values())
