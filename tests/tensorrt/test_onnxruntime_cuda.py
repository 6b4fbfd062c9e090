"""ONNX Runtime on CUDA, up to the device: what is missing is named in one line, and the CPU is never used."""

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.inference.loader import open_runtime
from sopdeploy_service.runtime import onnxruntime as with_onnxruntime
from sopdeploy_service.runtime.base import OverlappingRuntime
from sopdeploy_service.runtime.cuda_libraries import (
    CUDA_PROVIDER,
    CUDNN,
    DRIVER,
    SHARED,
    load_cuda_libraries,
)
from sopdeploy_service.runtime.onnxruntime import CPU, CUDA, OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.networks import network, some_images, write

ON_CUDA = Settings(runtime="onnxruntime-cuda")
REASON = "cannot open shared object file: No such file or directory"
# The library that cannot be opened, the one that is missing, and the message of onnxruntime-gpu
# 1.31.1.
MISSING = [
    (DRIVER, DRIVER, "`--gpus all`"),
    (CUDA_PROVIDER, "libcublasLt.so.13", "libcublasLt.so.13"),
    (CUDNN, CUDNN, "libcudnn.so.9"),
    (CUDA_PROVIDER, f"/somewhere/capi/{CUDA_PROVIDER}", CUDA_PROVIDER),
]


@pytest.mark.parametrize(("opened", "missing", "message"), MISSING)
def test_the_missing_library_is_named(
    opened: str,
    missing: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[str] = []

    def load(path: str, mode: int = 0) -> None:
        loaded.append(Path(path).name)
        if loaded[-1] == opened:
            raise OSError(f"{missing}: {REASON}")

    monkeypatch.setattr(ctypes, "CDLL", load)
    module = SimpleNamespace(
        __file__="/somewhere/__init__.py",
        __version__="1.31.1",
        preload_dlls=lambda **_: sys.stdout.write("x"),
    )

    with pytest.raises(RuntimeUnavailableError, match=message) as caught:
        load_cuda_libraries(module)
    assert (".[gpu]" in str(caught.value)) is (opened != DRIVER)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    order = [DRIVER, SHARED, CUDA_PROVIDER, CUDNN]
    assert loaded == order[: order.index(opened) + 1]


def claim_cuda(monkeypatch: pytest.MonkeyPatch, session: Callable[..., Any]) -> None:
    """Let the real onnxruntime claim CUDA, and open *session* instead of one on CUDA."""
    changes = {"get_available_providers": lambda: [CUDA, CPU], "InferenceSession": session}
    changed = SimpleNamespace(**vars(onnxruntime) | changes)
    monkeypatch.setattr(with_onnxruntime, "import_onnxruntime", lambda: changed)
    monkeypatch.setattr(with_onnxruntime, "load_cuda_libraries", lambda module: None)


def test_onnxruntime_uses_cuda_without_tf32_and_without_fallback_after_errors(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def session(path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        asked.append((providers, options.get_session_config_entry("session.disable_quant_qdq")))
        assert not enable_fallback, (
            "otherwise it continues on the CPU after an error, also of a later run"
        )
        made = onnxruntime.InferenceSession(path, providers=[CPU])
        made.get_providers = lambda: [CUDA, CPU]
        made.get_provider_graph_assignment_info = list
        return made

    claim_cuda(monkeypatch, session)
    assert open_runtime(bundle, Settings(runtime="auto")).device == "cuda:0"
    assert asked == [([(CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})], "1")]


def test_batches_on_cuda_overlap_and_give_their_own_outputs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(path: str, options: Any, **_: Any) -> Any:
        made = onnxruntime.InferenceSession(path, options, providers=[CPU])
        made.get_providers = lambda: [CUDA, CPU]
        made.get_provider_graph_assignment_info = list
        return made

    reference = OnnxRuntime(bundle, Settings(threads=1))
    claim_cuda(monkeypatch, session)
    runtime = open_runtime(bundle, ON_CUDA)
    assert isinstance(runtime, OverlappingRuntime)

    batches = [some_images(3), some_images(2)[::-1].copy()]
    expected = [reference.run(images)["logits"] for images in batches]
    ends = [runtime.begin(list(images)) for images in batches]
    for images in batches:
        images[:] = 0  # they are copied already
    (thread,) = (one for one in threading.enumerate() if one.name.startswith("onnxruntime"))

    assert thread.daemon, "a device that hangs must not delay the exit"
    for end, logits in zip(ends, expected, strict=True):
        np.testing.assert_allclose(end()["logits"], logits, rtol=1e-5, atol=1e-5)
    runtime.close()
    runtime.close()

    assert not thread.is_alive()


# The batches of each session, where convolutions are planned
PLANNED = [[1, 1], [2, 2], [4, 4], [16]]


@pytest.mark.parametrize(
    ("operator", "memory", "expected"),
    [
        ("Conv", 9, PLANNED),
        ("NhwcFusedConv", 9, PLANNED),
        ("Conv", 2, [[1, 4, 1, 16, 4], [2, 2]]),  # memory for two sessions only
        ("MatMul", 9, [[1, 2, 4, 1, 16, 4, 2]]),
    ],
)
def test_the_batches_of_a_session_with_planned_convolutions_have_one_size(
    operator: str,
    memory: int,
    expected: list[list[int]],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[list[int]] = []

    def session(path: str, options: Any, **_: Any) -> Any:
        if len(found) == memory:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 9")
        made = onnxruntime.InferenceSession(path, options, providers=[CPU])
        sizes = list[int]()
        found.append(sizes)
        run = made.run
        assigned = SimpleNamespace(ep_name=CUDA, get_nodes=lambda: [node])

        def recorded(names: list[str], values: dict[str, Any]) -> Any:
            sizes.append(len(values["images"]))
            return run(names, values)

        node = SimpleNamespace(op_type=operator)
        made.run = recorded
        made.get_providers = lambda: [CUDA, CPU]
        made.get_provider_graph_assignment_info = lambda: [assigned]
        return made

    claim_cuda(monkeypatch, session)
    runtime = open_runtime(bundle, ON_CUDA)
    for count in (1, 2, 3, 1, 9, 4, 2):
        assert len(runtime.run(some_images(count))["logits"]) == count
    runtime.close()
    assert found == expected


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        (["Conv"], ["1", "1", "1"]),
        # As of a transformer: tried once
        (["Conv", "Shape", "Shape"], ["1", None, None, None]),
    ],
)
def test_the_layout_of_a_graph_in_fp16_is_chosen_once(
    operators: list[str],
    expected: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = write(tmp_path, network(half=True), precision="fp16")
    asked = list[str | None]()

    def session(path: str, options: Any, providers: Any, **_: Any) -> Any:
        ((_, chosen),) = providers
        asked.append(chosen.get("prefer_nhwc"))
        made = onnxruntime.InferenceSession(path, options, providers=[CPU])
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        assigned = SimpleNamespace(ep_name=CUDA, get_nodes=lambda: nodes)
        made.get_providers = lambda: [CUDA, CPU]
        made.get_provider_options = lambda: {CUDA: chosen}
        made.get_provider_graph_assignment_info = lambda: [assigned]
        return made

    claim_cuda(monkeypatch, session)
    runtime = open_runtime(bundle, ON_CUDA)
    for count in (1, 2, 4):
        runtime.run(some_images(count))
    runtime.close()
    assert asked == expected


def test_int8_runs_on_cuda_only_if_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write(tmp_path, precision="int8")
    asked = []

    def session(*_: Any, providers: Any, **__: Any) -> Any:
        asked.append(providers)
        raise RuntimeError("no device")

    claim_cuda(monkeypatch, session)
    with pytest.raises(RuntimeUnavailableError, match="int8"):
        open_runtime(bundle, Settings(runtime="auto"))
    assert asked == []
    with pytest.raises(RuntimeUnavailableError, match="graph: no device"):
        open_runtime(bundle, ON_CUDA)
    assert len(asked) == 1


def test_another_provider_than_cuda_is_rejected(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_cuda(
        monkeypatch, lambda path, *_, **__: onnxruntime.InferenceSession(path, providers=[CPU])
    )

    with pytest.raises(RuntimeUnavailableError, match=CUDA):
        open_runtime(bundle, Settings(runtime="auto"))


def test_cuda_without_a_cuda_onnxruntime_says_what_to_install(bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"CUDAExecutionProvider"):
        open_runtime(bundle, ON_CUDA)
