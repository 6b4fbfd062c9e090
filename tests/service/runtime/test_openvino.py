"""OpenVINO runs the graph in its own types; `auto` takes it where it is faster and agrees with the probes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_runtime import FakeRuntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime import fastest as fastest_module
from sopdeploy_service.runtime import selection
from sopdeploy_service.runtime.fastest import fastest, time_runtimes
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.settings import Settings

pytest.importorskip("openvino")
IMAGES = np.random.default_rng(3).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def bfloat16_graph(power: int = 6) -> onnx.ModelProto:
    """Mean colors in bfloat16, then products of a float32 matrix, as in Newton-Schulz."""
    rng = np.random.default_rng(0)
    values = {
        "axes": np.array([1, 2], np.int64),
        "basis": rng.normal(size=(3, 7)).astype(np.float32),
        "matrix": (rng.normal(size=(7, 7)) / 3).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["wide", "axes"], ["colors"], keepdims=0),
        helper.make_node("MatMul", ["colors", "basis"], ["power0"]),
    ]
    nodes += [
        helper.make_node("MatMul", [f"power{step}", "matrix"], [f"power{step + 1}"]) for step in range(power)
    ]
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes,
        "bfloat16",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 32, 32, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 7])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_openvino_computes_the_outputs_of_onnx_runtime_and_keeps_them(bundle: Bundle) -> None:
    runtime = OpenVINORuntime(bundle, threads=1)
    expected = OnnxRuntime(bundle, threads=1).run(IMAGES)["logits"]
    outputs = runtime.run(IMAGES)["logits"]
    runtime.run(255 - IMAGES)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert runtime.run_outputs(IMAGES[:1], ["logits"])["logits"].shape == (1, 7)
    assert (runtime.device, runtime.largest_batch) == ("cpu", bundle.manifest.batch.maximum)
    runtime.close()


def test_float32_products_of_a_bfloat16_graph_stay_in_float32(bundle: Bundle, tmp_path: Path) -> None:
    model = bfloat16_graph()
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    expected = ReferenceEvaluator(model).run(None, {"images": IMAGES})[0]
    outputs = OpenVINORuntime(replace(bundle, path=tmp_path), threads=1).run(IMAGES)["logits"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4)  # bfloat16 has errors of 4e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no graph", "cannot compile the graph"), (None, "has other tensors than the manifest")],
)
def test_another_graph_is_refused_in_one_line(
    bundle: Bundle, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is None:
        model = onnx.load(bundle.onnx)
        model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"
        content = model.SerializeToString()
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(RuntimeUnavailableError, match=message) as problem:
        OpenVINORuntime(replace(bundle, path=tmp_path))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({"onnxruntime-cpu": 10.0, "openvino": 5.0}, "openvino"),
        ({"onnxruntime-cpu": 10.0, "openvino": 9.8}, "onnxruntime-cpu"),
        ({"onnxruntime-cpu": 10.0}, "onnxruntime-cpu"),
    ],
    ids=["faster", "about as fast", "not usable"],
)
def test_the_faster_runtime_is_measured_once_per_bundle_and_machine(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    milliseconds: dict[str, float],
    chosen: str,
) -> None:
    measured: list[str] = []

    def measure_once(measured_bundle: Bundle, _runtimes: object) -> dict[str, float]:
        measured.append(measured_bundle.name)
        return milliseconds

    monkeypatch.setattr(fastest_module, "time_runtimes", measure_once)
    for threads in (1, 1, 2):
        settings = Settings(engine_cache=tmp_path, threads=threads)
        assert fastest(bundle, settings, dict.fromkeys(selection.CPU_RUNTIMES, None))[0] == chosen
    assert measured == [bundle.name] * 2
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["milliseconds"] == milliseconds


def test_a_runtime_that_deviates_from_the_probes_or_is_missing_is_not_chosen(bundle: Bundle) -> None:
    def missing() -> FakeRuntime:
        raise RuntimeUnavailableError("not installed")

    runtimes: dict[str, Callable[[], FakeRuntime]] = {
        "onnxruntime-cpu": partial(OnnxRuntime, bundle, threads=1),
        "wrong": partial(FakeRuntime, num_classes=7),
        "missing": missing,
    }
    assert list(time_runtimes(bundle, runtimes)) == ["onnxruntime-cpu"]


@pytest.mark.parametrize(("precision", "name"), [("fp32", "onnxruntime-cpu"), ("bf16-backbone", "openvino")])
def test_auto_measures_on_a_cpu_except_for_bfloat16(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, precision: str, name: str
) -> None:
    manifest = bundle.manifest.model_copy(update={"precision": precision})
    monkeypatch.setattr(selection, "has_cuda", lambda: False)
    monkeypatch.setattr(selection, "fastest", lambda _bundle, _settings, names: (next(iter(names)), ""))
    runtime = selection.open_runtime(replace(bundle, manifest=manifest), Settings(runtime="auto"))
    assert runtime.name.startswith(name.partition("-")[0])


RELEASED_BEFORE_A_SIGNAL = """
import gc, os, signal, sys, threading
from pathlib import Path
from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.runtime.openvino import OpenVINORuntime

runtimes = [OpenVINORuntime(open_bundle(Path(sys.argv[1])), threads=1)]
release = threading.Thread(target=lambda: (runtimes.pop().close(), gc.collect()))
release.start()
release.join()
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_a_thread_has_released_a_runtime(bundle_path: Path) -> None:
    command = [sys.executable, "-c", RELEASED_BEFORE_A_SIGNAL, str(bundle_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr.strip()) == (1, "ended by SIGTERM")
