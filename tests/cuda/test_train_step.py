"""A training step of every family on a GPU, in torch's fake tensors: no operator mixes devices or types."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.stand_in import ABSENT, FOLDER, installed
from tests.support.rooms import ROOT
from tests.sweep.smallest import ALL

QUICK = (
    "resnet8",
    "gmsop-16-8-resnet18",
    "gsop-net1-resnet26",
    "dsop-resnet8",
    "netvlad-64-resnet18",
)
OTHERS = [small.name for small in ALL if small.name not in QUICK]
pytestmark = [
    pytest.mark.skipif(not installed(), reason=ABSENT),
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is installed without CUDA"),
]


@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.nightly)])
def test_a_training_step_stays_on_the_gpu_in_every_precision(
    names: list[str], tmp_path: Path
) -> None:
    compiler = shutil.which("gcc")
    library = tmp_path / "device.so"
    assert compiler

    headers = FOLDER / "headers" / "nvidia" / "cu13" / "include"
    # torch finds it as the library of the driver.
    command = [compiler, "-shared", "-fPIC", "-w", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", library, ROOT / "tests/cuda/device.c"], check=True)
    found = subprocess.run(
        [sys.executable, "-m", "tests.cuda.train_step", *names],
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 0, found.stderr

    steps = [json.loads(line) for line in found.stdout.splitlines()]
    expected = [
        [name, precision, ["cuda:0"]] for name in names for precision in ("fp32", "bf16")
    ]

    assert sorted(steps) == sorted(expected)
