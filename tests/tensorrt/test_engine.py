"""Engines: built by the real builder, verified on a simulated GPU, cached, served."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import (
    ConfigError,
    EngineError,
    LoweringError,
    ParityError,
    RuntimeUnavailableError,
    StorageError,
)
from sopdeploy_commands.app import app
from sopdeploy_commands.bundles.engine_builder.engine import EngineFile, get_engine
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.inference.loader import load_model, open_runtime
from sopdeploy_service.runtime.tensorrt import engine_folders
from sopdeploy_service.runtime.tensorrt_cache import (
    EngineRecord,
    Gpu,
    StoredEngine,
    cache_folder,
    key_fields,
    load_engine,
    parse_profiles,
    profile_index,
)
from sopdeploy_service.settings import Settings, load_settings
from tests.tensorrt.conftest import Install
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import write

OPTIONS = EngineOptions(profiles="1,4,16")


@pytest.fixture
def built(bundle: Bundle, install: Install) -> EngineFile:
    install()
    return get_engine(bundle, OPTIONS)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["engine", *map(str, arguments)])


def one_line(found: Result) -> str:
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1
    return found.stderr


def test_an_engine_that_was_built_reproduces_the_probes(
    trt: FakeTensorRT, bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    before = sorted(path.name for path in bundle.path.iterdir())
    told: list[str] = []
    built = get_engine(bundle, OPTIONS, told.append)
    assert built.reason == "no engine of this bundle was built here yet"
    assert [str(profile) for profile in built.record.key.profiles] == ["1", "2-4", "5-16"]
    assert [replay.batch for replay in built.record.replays] == [1, 2, 4, 5, 16]
    assert all(r.deviation["logits"] <= r.tolerance["logits"] for r in built.record.replays)
    assert any(text.startswith("building, 0:") for text in told)
    assert not trt._config.get_flag(trt.BuilderFlag.TF32)
    assert (cuda.held, cuda.streams, cuda.events) == ({}, {}, {})
    cached = get_engine(bundle, OPTIONS)
    assert (trt._builds, cached.reason, cached.record) == (1, None, built.record)
    assert built.path.parent == tmp_path / "engines" / bundle.name
    assert sorted(path.name for path in bundle.path.iterdir()) == before
    assert not list(tmp_path.rglob("*.partial"))
    written = built.path.with_suffix(".json").read_text()
    assert EngineRecord.model_validate_json(written) == built.record
    assert str(tmp_path) not in written


def test_an_engine_that_computes_something_else_is_not_kept(
    install: Install, tmp_path: Path
) -> None:
    install()
    with pytest.raises(ParityError, match="deviates by"):
        get_engine(write(tmp_path, wrong_by=0.01), OPTIONS)
    assert not list((tmp_path / "engines").rglob("*.plan"))


def test_a_cached_engine_that_computes_something_else_is_built_again(
    built: EngineFile, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter(
        [ParityError("probes: output 'logits' deviates by 1"), built.record.replays]
    )

    def replay(*_: Any) -> Any:
        if isinstance(outcome := next(outcomes), ParityError):
            raise outcome
        return outcome

    monkeypatch.setattr(
        "sopdeploy_commands.bundles.engine_builder.engine.replay_probes", replay
    )
    again = get_engine(bundle, OPTIONS)
    assert again.reason == "the cached engine is wrong, probes: output 'logits' deviates by 1"
    assert again.path == built.path


def test_a_bundle_that_is_quantized_for_cpus_is_refused(
    install: Install, bundle: Bundle
) -> None:
    install()
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"int8_for": "cpu"}))
    with pytest.raises(LoweringError, match=r"is quantized for CPUs.*--int8-for tensorrt"):
        get_engine(other, OPTIONS)


def test_the_message_of_tensorrt_reaches_the_user(
    install: Install, built: EngineFile, bundle: Bundle
) -> None:
    trt = install("11.1", "cannot start")  # pybind11 raises TypeError, it does not return None
    message = r"^TensorRT 11\.1\.0 cannot start here: CUDA initialization failure with error: 35; `sopdeploy env`"
    with pytest.raises(RuntimeUnavailableError, match=message):
        get_engine(bundle, OPTIONS)
    trt._faults = {"refuse"}
    with pytest.raises(
        EngineError, match=r"11\.1\.0 cannot build the engine: Could not find any impl"
    ):
        get_engine(
            bundle, OPTIONS.model_copy(update={"profiles": "1,2"})
        )  # which is not in the cache


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "no TensorRT": (
        {"tensorrt": None, "onnx": None},
        r'is not installed; run: pip install "sopdeploy\[tensorrt\]"',
    ),
    "TensorRT 10": ({"tensorrt": SimpleNamespace(__version__="10.16.0")}, "10.16.0 is too old"),
    "no cuda-python": ({"cuda.bindings.runtime": None}, "cuda-python is not installed"),
    "no driver": ({"gpus": None}, r"no NVIDIA GPU can be used here \(CUDA: cudaGetDeviceCount failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_without_tensorrt_or_a_gpu_the_error_is_one_line(
    case: str, bundle: Bundle, install: Install, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install()
    changes, message = MISSING[case]
    for name, value in changes.items():
        if name == "gpus":
            cuda.gpus = value
        else:
            monkeypatch.setitem(sys.modules, name, value)
    with pytest.raises(RuntimeUnavailableError, match=message):
        get_engine(bundle, OPTIONS)
    assert "error: " in one_line(run(bundle.path))
    assert trt._builds == 0


def use_engine_of_another_bundle(built: EngineFile, folder: Path) -> None:
    other = get_engine(write(folder / "other", config={"width": 5}), OPTIONS)
    assert other.record.key.name != built.record.key.name
    for suffix in (".plan", ".json"):
        shutil.copy(other.path.with_suffix(suffix), built.path.with_suffix(suffix))


CHANGES: dict[str, tuple[Callable[[EngineFile, Path], object], str]] = {
    "damaged": (
        lambda built, _: built.path.write_bytes(b"x"),
        "does not have the sha256 of its record",
    ),
    "missing": (lambda built, _: built.path.unlink(), "is missing"),
    "of another bundle": (
        use_engine_of_another_bundle,
        "no engine of this bundle was built here yet",
    ),
    "with an invalid record": (
        lambda built, _: built.path.with_suffix(".json").write_bytes(b"{}"),
        "no engine of this bundle was built here yet",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_plan_that_was_changed_is_not_loaded(
    case: str, built: EngineFile, bundle: Bundle, tmp_path: Path
) -> None:
    change, reason = CHANGES[case]
    change(built, tmp_path)
    with pytest.raises(RuntimeUnavailableError, match="; run: sopdeploy engine"):
        open_runtime(bundle, Settings(runtime="tensorrt"))
    again = get_engine(bundle, OPTIONS)
    assert reason in str(again.reason)
    assert get_engine(bundle, OPTIONS).reason is None


MACHINES: dict[str, tuple[Callable[[Install, FakeCuda], object], str, str]] = {
    "another TensorRT": (
        lambda install, _: install("11.4"),
        "1,4,16",
        "tensorrt 11.1.0, not 11.4.0",
    ),
    "another GPU": (
        lambda _, cuda: vars(cuda).update(gpu_name="Fake B200", sm=(10, 0)),
        "1,4,16",
        "gpu Fake H200, not Fake B200; architecture sm_90, not sm_100",
    ),
    "other profiles": (lambda *_: None, "1,8", "profiles 1,2-4,5-16, not 1,2-8"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_another_machine_or_other_profiles_get_their_own_engine(
    case: str, built: EngineFile, bundle: Bundle, install: Install, cuda: FakeCuda
) -> None:
    change, profiles, difference = MACHINES[case]
    change(install, cuda)
    if profiles == OPTIONS.profiles:
        with pytest.raises(
            RuntimeUnavailableError, match=f"{difference}; run: sopdeploy engine"
        ):
            open_runtime(bundle, Settings(runtime="tensorrt"))
    again = get_engine(bundle, EngineOptions(profiles=profiles))
    assert again.reason == f"the nearest engine here was built for {difference}"
    assert built.path.is_file()


def test_the_server_uses_the_engine_with_the_largest_batch(
    built: EngineFile, bundle: Bundle
) -> None:
    get_engine(bundle, EngineOptions(profiles="1,8"))
    gpu = Gpu(name="Fake H200", architecture="sm_90", memory=0)
    found = load_engine(built.path.parent, key_fields(bundle, "11.1.0", gpu))
    assert isinstance(found, StoredEngine)
    assert found.record == built.record


def test_the_command_builds_an_engine_and_then_uses_the_cache(
    install: Install, bundle: Bundle
) -> None:
    trt = install()
    first = run(bundle.path)
    assert first.exit_code == 0, first.stderr
    assert "built    no engine of this bundle was built here yet" in first.stdout
    assert "precision fp32" in first.stdout
    assert "probes   batch 16: logits of " in first.stdout
    assert "built    no, it was in the cache" in run(bundle.path).stdout
    assert trt._builds == 1


def test_engines_are_built_in_the_configured_cache_and_found_next_to_the_bundle_too(
    install: Install, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setenv("SOPDEPLOY_ENGINE_CACHE", str(tmp_path / "cache"))
    plan = Path(json.loads(run(bundle.path, "--json").stdout)["plan"])
    assert plan.is_relative_to(tmp_path / "cache")
    settings = load_settings(runtime="tensorrt")
    assert engine_folders(bundle, settings) == [plan.parent]
    shutil.copytree(plan.parent, cache_folder(bundle))
    assert engine_folders(bundle, settings) == [plan.parent, cache_folder(bundle)]
    plan.write_bytes(b"damaged")
    assert open_runtime(bundle, settings).name.startswith(
        "tensorrt"
    )  # the one beside the bundle
    shutil.rmtree(plan.parent)
    assert engine_folders(bundle, settings) == [cache_folder(bundle)]
    assert get_engine(bundle, EngineOptions(cache=tmp_path / "mine")).path.is_relative_to(
        tmp_path / "mine"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        get_engine(bundle, EngineOptions(cache=tmp_path / "file"))


def test_the_container_image_keeps_engines_in_its_volume() -> None:
    text = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
    (volume,) = re.findall(r"^VOLUME (\S+)$", text, re.MULTILINE)
    assert f"SOPDEPLOY_ENGINE_CACHE={volume}/" in text


def test_auto_uses_an_existing_engine_and_never_falls_back_to_the_cpu(
    install: Install,
    bundle: Bundle,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install()
    assert open_runtime(bundle, Settings(runtime="auto")).name.startswith("onnxruntime")
    get_engine(bundle, OPTIONS)
    found = load_model(bundle.path, Settings(runtime="auto"))
    assert (found.runtime.name, sorted(found.replays)) == ("tensorrt 11.1.0", [1, 3])
    cuda.gpus = 0
    message = "tensorrt is set up here but does not work: no NVIDIA GPU"
    with pytest.raises(RuntimeUnavailableError, match=message):
        open_runtime(bundle, Settings(runtime="auto"))
    assert open_runtime(bundle, Settings(runtime="onnxruntime-cpu")).device == "cpu"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert open_runtime(bundle, Settings(runtime="auto")).device == "cpu"
    assert "its TensorRT engines are not used: TensorRT is not installed" in caplog.text


RANGE = BatchRange(minimum=1, optimum=8, maximum=64)


def test_the_default_profiles_are_the_batch_range_of_the_bundle() -> None:
    assert [str(p) for p in parse_profiles(None, RANGE)] == ["1", "2-8", "9-64"]
    assert [str(p) for p in parse_profiles(None, BatchRange(optimum=1, maximum=1))] == ["1"]


@given(st.sets(st.integers(1, 64), min_size=1, max_size=8))
def test_every_batch_has_exactly_one_profile_up_to_the_largest(sizes: set[int]) -> None:
    profiles = parse_profiles(",".join(map(str, sizes)), RANGE)
    for batch in range(1, max(sizes) + 1):
        fitting = [i for i, p in enumerate(profiles) if p.minimum <= batch <= p.maximum]
        assert fitting == [profile_index(profiles, batch)]
    with pytest.raises(ConfigError, match="no profile accepts"):
        profile_index(profiles, max(sizes) + 1)


@pytest.mark.parametrize("text", ["", "1,,8", "0", "1,65"])
def test_invalid_profiles_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="profiles="):
        parse_profiles(text, RANGE)
