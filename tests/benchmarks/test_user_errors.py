"""Wrong options of benchmarks end in one line with the exit code 2."""

import runpy
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


def assert_one_line(script: str, code: int, out: str, err: str, expected: str) -> None:
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].removeprefix(f"{script}: ").startswith(expected)
    assert "Traceback" not in err


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_option_is_a_one_line_error(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the script as the command does, but in this process, which has imported torch."""
    script, *options = case.split()
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.chdir(BENCHMARKS)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert isinstance(stopped.value.code, int)
    assert_one_line(script, stopped.value.code, *capsys.readouterr(), CASES[case])
