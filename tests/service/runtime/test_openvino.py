"""OpenVINO runs the graph in its own types."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.settings import Settings

if find_spec("openvino") is None:  # importing it here would start its telemetry
    pytest.skip("OpenVINO is not installed", allow_module_level=True)
IMAGES = np.random.default_rng(3).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def test_openvino_computes_the_outputs_of_onnx_runtime_and_keeps_them(bundle: Bundle) -> None:
    runtime = OpenVINORuntime(bundle, Settings(threads=1))
    expected = OnnxRuntime(bundle, Settings(threads=1)).run(IMAGES)["logits"]
    outputs = runtime.run(IMAGES)["logits"]
    runtime.run(255 - IMAGES)

    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert runtime.run(IMAGES[:1])["logits"].shape == (1, 7)
    assert (runtime.device, runtime.largest_batch) == ("cpu", bundle.manifest.batch.maximum)

    runtime.close()


@pytest.mark.parametrize(
    ("content", "message"), [(b"no graph", "cannot compile"), (None, "other tensors")]
)
def test_another_graph_is_refused_in_one_line(
    bundle: Bundle, content: bytes | None, message: str
) -> None:
    if content is None:
        model = onnx.load_model_from_string(bundle.onnx.read())
        model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"
        content = model.SerializeToString()

    with pytest.raises(RuntimeUnavailableError, match=message) as problem:
        OpenVINORuntime(replace(bundle, graph=SealedFile([content])), Settings())
    assert "\n" not in str(problem.value)


OPENS = """
import sys
from sopdeploy_service.runtime.openvino import openvino_core

openvino_core()
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
"""


@pytest.mark.parametrize("home", ["home", "missing"])
def test_opening_it_sends_nothing_and_leaves_the_home_folder_alone(
    tmp_path: Path, home: str
) -> None:
    (tmp_path / "home").mkdir()
    # Switches it off, too
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["HOME"] = str(tmp_path / home)
    done = subprocess.run(
        [sys.executable, "-c", OPENS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0
    assert done.stderr == ""
    assert list((tmp_path / "home").iterdir()) == []


RELEASED_BEFORE_A_SIGNAL = """
import gc, os, signal, sys, threading
from pathlib import Path
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.settings import Settings

runtimes = [OpenVINORuntime(open_bundle(Path(sys.argv[1])), Settings(threads=1))]
release = threading.Thread(target=lambda: (runtimes.pop().close(), gc.collect()))
release.start()
release.join()
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_a_thread_has_released_a_runtime(bundle_path: Path) -> None:
    command = [sys.executable, "-c", RELEASED_BEFORE_A_SIGNAL, str(bundle_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)

    # Before this line, OpenVINO warns if it cannot write to the home.
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ended by SIGTERM"), (
        done.stderr
    )
