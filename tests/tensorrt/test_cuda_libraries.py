"""A missing driver or CUDA library is named in one line before ONNX Runtime is asked to open a session."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime import onnxruntime as with_onnxruntime
from sopdeploy_service.runtime.cuda_libraries import CUDNN, DRIVER, PROVIDER, SHARED, load_cuda_libraries
from sopdeploy_service.runtime.selection import open_runtime
from sopdeploy_service.settings import Settings
from tests.tensorrt.test_runtime import FakeOnnxRuntime

MISSING = "cannot open shared object file: No such file or directory"
ADVICE = r'; run: pip install "sopdeploy\[gpu\]"'
# What is missing, the file that is opened then, and the message; texts as of onnxruntime-gpu 1.31.1.
CASES = {
    "the driver": (DRIVER, DRIVER, "no NVIDIA driver is usable here .*`--gpus all`"),
    "cuBLAS": ("libcublasLt.so.13", PROVIDER, rf"needs libcublasLt.so.13 for CUDA \({MISSING}\){ADVICE}"),
    "cuDNN": (CUDNN, CUDNN, rf"needs libcudnn.so.9 for CUDA \({MISSING}\){ADVICE}"),
    "the provider": (f"/somewhere/capi/{PROVIDER}", PROVIDER, rf"needs {PROVIDER} for CUDA .*{ADVICE}"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_missing_library_is_named(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, opened, message = CASES[case]
    loaded: list[str] = []

    def load(path: str, mode: int = 0) -> None:
        loaded.append(Path(path).name)
        if loaded[-1] == opened:
            raise OSError(f"{missing}: {MISSING}")

    monkeypatch.setattr(ctypes, "CDLL", load)
    module = SimpleNamespace(
        __file__="/somewhere/__init__.py", __version__="1.31.1", preload_dlls=lambda: sys.stdout.write("x")
    )
    with pytest.raises(RuntimeUnavailableError, match=f"{message}$|{message}") as caught:
        load_cuda_libraries(module)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    order = [DRIVER, SHARED, PROVIDER, CUDNN]
    assert loaded == order[: order.index(opened) + 1]


def test_without_a_driver_a_server_gets_one_line_and_the_way_to_use_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        fake: Any = FakeOnnxRuntime([])
        fake.preload_dlls = onnxruntime.preload_dlls  # the real one
        monkeypatch.setattr(with_onnxruntime, "_import_onnxruntime", lambda: fake)
        message = (
            r"^onnxruntime-cuda is set up here but does not work: no NVIDIA driver .*onnxruntime-cpu would"
        )
        with pytest.raises(RuntimeUnavailableError, match=message):
            open_runtime(bundle, Settings())
        assert fake.asked is None
    else:
        pytest.skip("this machine has an NVIDIA driver")
