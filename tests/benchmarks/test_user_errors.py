"""Wrong options of benchmarks end in one line with the exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NOT_FOUND = "error: argument {}: /nowhere: not found"
CASES = {  # options: the last line
    "classify.py --bundle /nowhere": NOT_FOUND.format("--bundle"),
    "classify.py --bundle . --images /nowhere": NOT_FOUND.format("--images"),
    "classify.py --bundle .": "error: .: no manifest.json; was this folder written by `sopdeploy export`?",
    "calibration.py --as resnet20 --weights /nowhere --data .": NOT_FOUND.format("--weights"),
    "calibration.py --as resnet2 --weights . --data .": "error: ",
    "serving.py --peers /nowhere --onnx .": NOT_FOUND.format("--peers"),
    "serving.py --bundle .": "error: .: no manifest.json; was this folder written by `sopdeploy export`?",
    "request_cpu.py --other /nowhere": NOT_FOUND.format("--other"),
    "second_order_gain.py --cifar /nowhere --cache .": NOT_FOUND.format("--cifar"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_option_is_a_one_line_error(case: str) -> None:
    script, *options = case.split()
    done = subprocess.run(
        [sys.executable, script, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCHMARKS,
    )
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.removeprefix(f"{script}: ").startswith(CASES[case])
    assert "Traceback" not in done.stderr
