"""One module builds on every release, and keeps only what it saw to be right."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import EngineError, LoweringError, ParityError, RuntimeUnavailableError
from sopdeploy.tensorrt.cache import look
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy_export.tensorrt import engine as engine_tensorrt
from sopdeploy_export.tensorrt.build import BuildRequest, build, network_flags
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT
from tests.tensorrt.networks import network, write

Install = Callable[..., FakeTensorRT]
OPTIONS = EngineOptions(profiles="1,4,16")


def test_every_release_builds_an_engine_that_gives_the_bundles_numbers(
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


def test_the_second_time_the_engine_comes_from_the_cache_and_its_probes_run_again(
    trt: FakeTensorRT, bundle: Bundle
) -> None:
    first, second = get_engine(bundle, OPTIONS), get_engine(bundle, OPTIONS)
    assert trt._builds == 1
    assert second.reason is None
    assert second.record == first.record


def test_engines_lie_beside_the_bundle_or_where_the_user_wants_and_leave_the_bundle_alone(
    bundle: Bundle, install: Install, tmp_path: Path
) -> None:
    install()
    before = sorted(path.name for path in bundle.path.iterdir())
    assert get_engine(bundle, OPTIONS).path.parent == tmp_path / "engines" / bundle.name
    elsewhere = get_engine(bundle, EngineOptions(cache=tmp_path / "mine")).path
    assert elsewhere.parent == tmp_path / "mine" / bundle.name
    assert sorted(path.name for path in bundle.path.iterdir()) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_tf32_which_every_release_has_on_is_cleared(trt: FakeTensorRT, bundle: Bundle) -> None:
    get_engine(bundle, OPTIONS)
    assert not trt._last["config"].get_flag(trt.BuilderFlag.TF32)


def test_only_what_a_release_knows_is_asked_of_it(trt: FakeTensorRT) -> None:
    names = trt.NetworkDefinitionCreationFlag
    kind = names.EXPLICIT_BATCH if trt._major == 8 else names.STRONGLY_TYPED
    assert network_flags(trt) == 1 << kind


def test_fp16_in_the_graph_becomes_fp16_in_the_engine_of_every_release(
    trt: FakeTensorRT, tmp_path: Path
) -> None:
    bundle = write(tmp_path, network(half=True))
    built = get_engine(bundle, EngineOptions(precision="fp16", profiles="1,4"))
    assert built.record.receipt.parts["layer1"].realised["fp16"] > 0
    assert built.record.receipt.parts["second order"].realised == {"fp32": 3}


def test_tensorrt_8_is_told_the_precision_of_every_layer(install: Install, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("version", VERSIONS)
def test_sabotage_an_fp32_graph_that_is_asked_to_be_fp16_is_refused_before_the_build(
    version: str, install: Install, bundle: Bundle
) -> None:
    trt = install(version)
    with pytest.raises(
        EngineError, match=r"fp16 was requested but the graph is fp32.*export.*--precision fp16"
    ):
        get_engine(bundle, EngineOptions(precision="fp16"))
    assert trt._builds == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_sabotage_a_builder_that_silently_stays_in_fp32_fails_by_its_receipt(
    version: str, install: Install, tmp_path: Path
) -> None:
    install(version, "silent fp32")
    with pytest.raises(EngineError, match=r"^layer1: .*computes with fp32, the graph asks for fp16"):
        get_engine(write(tmp_path, network(half=True)), EngineOptions(precision="fp16"))
    assert not list((tmp_path / "engines").rglob("*.plan"))


def test_sabotage_opset_18_reduce_mean_read_by_8_6_without_the_lint_gives_other_numbers(
    install: Install, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hazard is real: nothing fails but the probes."""
    install("8.6.1")

    def only_the_bytes(model, version, profiles):
        from sopdeploy_export.tensorrt.rewrites import cast_bytes_first

        safe = copy.deepcopy(model)
        cast_bytes_first(safe, version)
        return safe, ()

    monkeypatch.setattr(engine_tensorrt, "lint", only_the_bytes)
    with pytest.raises(ParityError, match="does not compute the exported network"):
        get_engine(bundle, OPTIONS)


def test_sabotage_a_batch_fixed_to_one_is_refused_before_the_build(install: Install, tmp_path: Path) -> None:
    trt = install()
    bundle = write(tmp_path / "free")
    (bundle.path / "model.onnx").write_bytes(network(batch=1).SerializeToString())
    with pytest.raises(LoweringError, match="fixes the batch of images to 1"):
        get_engine(bundle, OPTIONS)
    assert trt._builds == 0


def test_an_engine_with_other_numbers_is_not_kept(install: Install, tmp_path: Path) -> None:
    install()
    with pytest.raises(ParityError, match="deviates by"):
        get_engine(write(tmp_path, wrong_by=0.01), OPTIONS)
    assert not list((tmp_path / "engines").rglob("*.plan"))


def test_tensorrts_own_words_reach_the_user(install: Install, bundle: Bundle) -> None:
    install("11.1", "refuse")
    with pytest.raises(
        EngineError, match=r"TensorRT 11\.1\.0 cannot build the engine: Could not find any impl"
    ):
        get_engine(bundle, OPTIONS)


def test_a_graph_that_the_parser_refuses_names_the_operator(trt: FakeTensorRT) -> None:
    request = BuildRequest(
        onnx=network().SerializeToString(),
        profiles=(Profile(minimum=1, optimum=1, maximum=1),),
        precision="fp32",
    )
    with pytest.raises(EngineError, match="cannot read the graph: node 0: Transpose is not supported"):
        build(trt, request, lambda _: None)


def test_the_timings_of_one_build_serve_the_next(install: Install, bundle: Bundle) -> None:
    trt = install()
    get_engine(bundle, OPTIONS)
    assert trt._last["config"]._timings._content == b""
    get_engine(bundle, EngineOptions(profiles="1,8"))
    assert trt._last["config"]._timings._content == b"t"


@pytest.mark.parametrize("content", [b"damaged", b"of another machine"])
def test_timings_that_do_not_fit_are_left_out(content: bytes, trt: FakeTensorRT, bundle: Bundle) -> None:
    folder = get_engine(bundle, OPTIONS).path.parent
    (timings,) = folder.glob("timing-*.cache")
    timings.write_bytes(content)
    get_engine(bundle, EngineOptions(profiles="1,8"))
    assert trt._last["config"]._timings._content == b""
    assert timings.read_bytes() == b"t"


def test_control_c_ends_a_build(install: Install, bundle: Bundle) -> None:
    install()

    def interrupt(text: str) -> None:
        if "50%" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_engine(bundle, OPTIONS, interrupt)


def test_without_tensorrt_the_error_says_how_to_get_it(
    bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        RuntimeUnavailableError, match=r'not installed; run: pip install "sopdeploy\[tensorrt\]"'
    ):
        get_engine(bundle, OPTIONS)


@pytest.mark.parametrize("gpus", [None, 0])
def test_without_a_gpu_tensorrt_is_not_even_asked(
    gpus: int | None, bundle: Bundle, install: Install, cuda: FakeCuda
) -> None:
    trt = install("8.6.1")
    cuda.gpus = gpus
    with pytest.raises(RuntimeUnavailableError, match="no NVIDIA GPU can be used here"):
        get_engine(bundle, OPTIONS)
    assert trt._builds == 0


def test_without_cuda_python_the_error_says_how_to_get_it(
    bundle: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeUnavailableError, match="cuda-python is not installed"):
        get_engine(bundle, OPTIONS)


def test_a_release_before_8_6_is_refused(install: Install, bundle: Bundle) -> None:
    install().__version__ = "8.5.3"
    with pytest.raises(RuntimeUnavailableError, match="too old"):
        get_engine(bundle, OPTIONS)


def test_what_is_stored_is_what_is_found(install: Install, bundle: Bundle) -> None:
    install()
    built = get_engine(bundle, OPTIONS)
    found = look(built.path.parent, built.record.key)
    assert np.frombuffer(found.plan, dtype=np.uint8).size == built.record.plan_bytes
