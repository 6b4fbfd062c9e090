"""The server runs on a verified engine and never falls back to the CPU silently."""

import shutil
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy_export.tensorrt.engine import Engine, EngineOptions, get_engine
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime import onnxruntime as with_onnxruntime
from sopdeploy_service.runtime.onnxruntime import CPU, CUDA
from sopdeploy_service.runtime.selection import open_runtime
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings, load_settings
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import network, outputs_of, some_images

Install = Callable[..., FakeTensorRT]
OPTIONS = EngineOptions(profiles="1,4,16")
ON_ENGINE = Settings(runtime="tensorrt")


@pytest.fixture
def built(install: Install, bundle: Bundle) -> Engine:
    """An engine of the bundle in the cache, with TensorRT 10.16."""
    install()
    return get_engine(bundle, OPTIONS)


def test_the_server_runs_every_batch_size_on_the_engine(trt: FakeTensorRT, bundle: Bundle) -> None:
    get_engine(bundle, OPTIONS)
    runtime = TensorRTRuntime(bundle, ON_ENGINE)
    name = f"tensorrt {trt.__version__}"
    assert (runtime.name, runtime.device, runtime.largest_batch) == (name, "cuda:0", 16)
    batches = [some_images(count) for count in (1, 2, 4, 5, 16)]
    found = [runtime.run(images)["logits"] for images in batches]  # the next batch overwrites no outputs
    for logits, images in zip(found, batches, strict=True):
        np.testing.assert_allclose(logits, outputs_of(network(), images), rtol=1e-4, atol=1e-3)


def test_the_probes_run_on_the_engine_at_startup(built: Engine, bundle: Bundle) -> None:
    found = load_model(bundle.path, Settings())
    assert (found.runtime.device, sorted(found.replays)) == ("cuda:0", [1, 3])


MISSES: dict[str, tuple[Callable[[Engine, Install], object], str]] = {
    "no engine": (lambda built, _: shutil.rmtree(built.path.parent), "no engine of this bundle.*"),
    "another TensorRT": (lambda _, install: install("11.1"), r"TensorRT 10\.16\.0, not 11\.1\.0"),
    "a replaced plan": (lambda built, _: built.path.write_bytes(b"x"), "not have the sha256 of its record.*"),
}


@pytest.mark.parametrize("case", MISSES)
def test_only_a_matching_engine_is_loaded(case: str, built: Engine, bundle: Bundle, install: Install) -> None:
    change, message = MISSES[case]
    change(built, install)
    with pytest.raises(RuntimeUnavailableError, match=f"{message}; run: sopdeploy engine"):
        open_runtime(bundle, ON_ENGINE)


def test_auto_uses_an_existing_engine_and_never_falls_back_to_the_cpu(
    install: Install, bundle: Bundle, cuda: FakeCuda
) -> None:
    install()
    assert open_runtime(bundle, Settings()).name.startswith("onnxruntime")
    get_engine(bundle, OPTIONS)
    assert open_runtime(bundle, Settings()).name == "tensorrt 10.16.0"
    cuda.gpus = 0
    message = "tensorrt is set up here but does not work: no NVIDIA GPU"
    with pytest.raises(RuntimeUnavailableError, match=message):
        open_runtime(bundle, Settings())
    assert open_runtime(bundle, Settings(runtime="onnxruntime-cpu")).device == "cpu"


class FakeOnnxRuntime(ModuleType):
    """An onnxruntime made for CUDA whose sessions run on *chosen*."""

    def __init__(self, chosen: list[str]) -> None:
        super().__init__("onnxruntime")
        self.__version__ = "1.31.1"
        self.entries: dict[str, str] = {}
        self.asked: Any = None
        self._chosen = chosen
        self.GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_ALL=99)

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_session_config_entry=self.entries.__setitem__)

    def InferenceSession(self, path: str, options: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        assert not enable_fallback, "otherwise it continues on the CPU after an error, also of a later run"
        self.asked = providers
        named = [SimpleNamespace(name=name) for name in ("images", "logits")]
        return SimpleNamespace(
            get_providers=lambda: self._chosen, get_inputs=lambda: named[:1], get_outputs=lambda: named[1:]
        )


def test_onnxruntime_uses_cuda_without_tf32_and_without_cpu_fallback(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeOnnxRuntime([CUDA, CPU])
    monkeypatch.setattr(with_onnxruntime, "_import_onnxruntime", lambda: fake)
    monkeypatch.setattr(with_onnxruntime, "load_cuda_libraries", lambda module: None)
    assert open_runtime(bundle, Settings()).device == "cuda:0"
    assert fake.asked == [(CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})]
    assert fake.entries["session.disable_cpu_ep_fallback"] == "1"


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime-cuda"])
def test_another_provider_than_requested_is_rejected(
    runtime: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(with_onnxruntime, "_import_onnxruntime", lambda: FakeOnnxRuntime([CPU]))
    monkeypatch.setattr(with_onnxruntime, "load_cuda_libraries", lambda module: None)
    with pytest.raises(RuntimeUnavailableError, match=f"asked for {CUDA}, onnxruntime chose"):
        open_runtime(bundle, Settings(runtime=runtime))


# From onnxruntime-gpu 1.31.1 with CUDA 13.5 and a driver that is too old.
OLD_DRIVER = """
/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 [with ERRTYPE = cudaError; bool THRW = true]
CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=h ;
file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=355 ;
"""


def test_a_failure_of_cuda_is_shown_without_the_library_s_source(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(OLD_DRIVER)

    fake = FakeOnnxRuntime([])
    monkeypatch.setattr(fake, "InferenceSession", fails)
    monkeypatch.setattr(with_onnxruntime, "_import_onnxruntime", lambda: fake)
    monkeypatch.setattr(with_onnxruntime, "load_cuda_libraries", lambda module: None)
    message = (
        r"cannot load the graph: CUDA failure 35: CUDA driver version is insufficient .* runtime version$"
    )
    with pytest.raises(RuntimeUnavailableError, match=message):
        open_runtime(bundle, Settings(runtime="onnxruntime-cuda"))


def test_a_graph_with_operators_that_only_a_cpu_can_run_says_what_to_do(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure = "AzureExecutionProvider"  # a provider of every wheel, which has none of our operators
    monkeypatch.setitem(with_onnxruntime.DEVICES, azure, "azure")
    with pytest.raises(RuntimeUnavailableError, match=f"all operators of the graph on {azure}; export the"):
        with_onnxruntime._open_session(onnxruntime, bundle, 1, azure, {})


def test_cuda_without_a_cuda_onnxruntime_says_what_to_install(bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"has no CUDAExecutionProvider here; run: pip install"):
        open_runtime(bundle, Settings(runtime="onnxruntime-cuda"))


@pytest.mark.parametrize("unknown", ["openvino", "onnxruntime-tensorrt"])
def test_an_unknown_runtime_is_rejected(unknown: str) -> None:
    with pytest.raises(ConfigError, match="settings: runtime"):
        load_settings(runtime=unknown)
