"""One builder works with every TensorRT release and keeps only verified engines."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import EngineError, LoweringError, ParityError, RuntimeUnavailableError
from sopdeploy_export.tensorrt import engine as engine_module
from sopdeploy_export.tensorrt.build import network_flags
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from sopdeploy_export.tensorrt.rewrites import cast_bytes_first
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT
from tests.tensorrt.networks import network, write

Install = Callable[..., FakeTensorRT]
OPTIONS = EngineOptions(profiles="1,4,16")


def test_every_release_builds_an_engine_that_reproduces_the_probes(
    trt: FakeTensorRT, bundle: Bundle, cuda: FakeCuda
) -> None:
    told: list[str] = []
    built = get_engine(bundle, OPTIONS, told.append)
    assert built.reason == "no engine of this bundle was built here yet"
    assert [str(profile) for profile in built.record.key.profiles] == ["1", "2-4", "5-16"]
    assert [replay.batch for replay in built.record.replays] == [1, 2, 4, 5, 16]
    assert all(r.deviation["logits"] <= r.tolerance["logits"] for r in built.record.replays)
    assert any("50%" in text for text in told) == (trt._major >= 10)
    assert (cuda.held, cuda.streams, cuda.events) == ({}, {}, {})
    cached = get_engine(bundle, OPTIONS)
    assert (trt._builds, cached.reason, cached.record) == (1, None, built.record)


def test_engines_are_stored_beside_the_bundle_or_in_the_given_cache(
    bundle: Bundle, install: Install, tmp_path: Path
) -> None:
    install()
    before = sorted(path.name for path in bundle.path.iterdir())
    assert get_engine(bundle, OPTIONS).path.parent == tmp_path / "engines" / bundle.name
    elsewhere = get_engine(bundle, EngineOptions(cache=tmp_path / "mine")).path
    assert elsewhere.parent == tmp_path / "mine" / bundle.name
    assert sorted(path.name for path in bundle.path.iterdir()) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_tf32_is_off_and_the_network_flags_fit_the_release(trt: FakeTensorRT, bundle: Bundle) -> None:
    get_engine(bundle, OPTIONS)
    assert not trt._last["config"].get_flag(trt.BuilderFlag.TF32)
    names = trt.NetworkDefinitionCreationFlag
    assert network_flags(trt) == 1 << (names.EXPLICIT_BATCH if trt._major == 8 else names.STRONGLY_TYPED)


def test_an_fp16_graph_becomes_an_fp16_engine(trt: FakeTensorRT, tmp_path: Path) -> None:
    bundle = write(tmp_path, network(half=True))
    built = get_engine(bundle, EngineOptions(precision="fp16", profiles="1,4"))
    assert built.record.receipt.parts["layer1"].realised["fp16"] > 0
    assert built.record.receipt.parts["second order"].realised == {"fp32": 3}


def test_tensorrt_8_gets_the_precision_of_every_layer(install: Install, tmp_path: Path) -> None:
    trt = install("8.6.1")
    get_engine(write(tmp_path, network(half=True)), EngineOptions(precision="fp16"))
    config, kinds = trt._last["config"], trt.BuilderFlag
    assert config.get_flag(kinds.FP16)
    assert config.get_flag(kinds.OBEY_PRECISION_CONSTRAINTS)
    asked = {
        layer.name: layer.precision for layer in trt._last["network"]._layers if hasattr(layer, "precision")
    }
    assert asked["node_convolved"] == trt.DataType.HALF
    assert asked["node_covariance"] == trt.DataType.FLOAT


def test_fp16_is_not_built_from_an_fp32_graph(trt: FakeTensorRT, bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"fp16 was requested but the graph is fp32.*export.*--precision fp16"
    ):
        get_engine(bundle, EngineOptions(precision="fp16"))
    assert trt._builds == 0


WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "fp32 instead of fp16": (
        "silent fp32", {"model": network(half=True), "precision": "fp16"}, EngineError,
        "^layer1: .*computes with fp32, the graph asks for fp16.*without --strict the probes decide",
    ),
    "other numbers": ("none", {"wrong_by": 0.01}, ParityError, "deviates by"),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", WRONG)
def test_an_engine_that_computes_something_else_is_not_kept(
    case: str, version: str, install: Install, tmp_path: Path
) -> None:
    fault, fields, kind, message = WRONG[case]
    install(version, fault)
    with pytest.raises(kind, match=message):
        get_engine(write(tmp_path, **fields), EngineOptions(strict=True))
    assert not list((tmp_path / "engines").rglob("*.plan"))


def test_without_strict_a_doubtful_precision_is_recorded_and_the_probes_decide(
    install: Install, tmp_path: Path
) -> None:
    install("11.1", "silent fp32")
    bundle = write(tmp_path, network(half=True), precision="fp16")
    built = get_engine(bundle, EngineOptions())
    assert "computes with fp32, the graph asks for fp16" in built.record.receipt.warnings[0]
    assert json.loads(built.path.with_suffix(".json").read_text())["receipt"]["warnings"]
    with pytest.raises(EngineError, match="without --strict the probes decide"):
        get_engine(bundle, EngineOptions(strict=True))  # from the cache


def test_without_the_lint_only_the_probes_detect_that_8_6_ignores_axes(
    install: Install, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("8.6.1")

    def without_axes_rewrite(model, version, profiles):
        safe = copy.deepcopy(model)
        cast_bytes_first(safe, version)
        return safe, ()

    monkeypatch.setattr(engine_module, "lint", without_axes_rewrite)
    with pytest.raises(ParityError, match="does not compute the exported network"):
        get_engine(bundle, OPTIONS)


def test_a_graph_with_a_fixed_batch_is_not_built(install: Install, tmp_path: Path) -> None:
    trt = install()
    bundle = write(tmp_path / "free")
    (bundle.path / "model.onnx").write_bytes(network(batch=1).SerializeToString())
    with pytest.raises(LoweringError, match="fixes the batch of images to 1"):
        get_engine(bundle, OPTIONS)
    assert trt._builds == 0


def test_the_message_of_tensorrt_reaches_the_user(install: Install, bundle: Bundle) -> None:
    install("11.1", "refuse")
    with pytest.raises(
        EngineError, match=r"TensorRT 11\.1\.0 cannot build the engine: Could not find any impl"
    ):
        get_engine(bundle, OPTIONS)


def test_tensorrt_that_cannot_start_is_a_one_line_error(install: Install, bundle: Bundle) -> None:
    trt = install("11.1")
    get_engine(bundle, OPTIONS)
    trt._faults.add("cannot start")  # pybind11 raises TypeError, it does not return None
    message = (
        r"^TensorRT 11\.1\.0 cannot start here: CUDA initialization failure with error: 35; `sopdeploy env`"
    )
    for rebuild in (True, False):
        with pytest.raises(RuntimeUnavailableError, match=message):
            get_engine(bundle, OPTIONS.model_copy(update={"rebuild": rebuild}))


def test_the_timing_cache_of_one_build_is_used_by_the_next(install: Install, bundle: Bundle) -> None:
    trt = install()
    get_engine(bundle, OPTIONS)
    assert trt._last["config"]._timings._content == b""
    get_engine(bundle, EngineOptions(profiles="1,8"))
    assert trt._last["config"]._timings._content == b"t"


@pytest.mark.parametrize("content", [b"damaged", b"of another machine"])
def test_an_invalid_timing_cache_is_ignored(content: bytes, trt: FakeTensorRT, bundle: Bundle) -> None:
    folder = get_engine(bundle, OPTIONS).path.parent
    (timings,) = folder.glob("timing-*.cache")
    timings.write_bytes(content)
    get_engine(bundle, EngineOptions(profiles="1,8"))
    assert trt._last["config"]._timings._content == b""
    assert timings.read_bytes() == b"t"


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "no TensorRT": ({"tensorrt": None}, r'is not installed; run: pip install "sopdeploy\[tensorrt\]"'),
    "TensorRT 8.5": ({"tensorrt": SimpleNamespace(__version__="8.5.3")}, "8.5.3 is too old"),
    "no cuda-python": (
        {"cuda.bindings.runtime": None, "cuda.cudart": None}, "cuda-python is not installed",
    ),
    "no driver": ({"gpus": None}, "no NVIDIA GPU can be used here"),
    "no GPU": ({"gpus": 0}, "no NVIDIA GPU can be used here"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_without_tensorrt_or_a_gpu_nothing_is_built(
    case: str, bundle: Bundle, install: Install, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install("8.6.1")
    changes, message = MISSING[case]
    for name, value in changes.items():
        if name == "gpus":
            cuda.gpus = value
        else:
            monkeypatch.setitem(sys.modules, name, value)
    with pytest.raises(RuntimeUnavailableError, match=message):
        get_engine(bundle, OPTIONS)
    assert trt._builds == 0
