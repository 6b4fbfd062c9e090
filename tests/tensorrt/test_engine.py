"""Engines: which one is used, when one is built again, and what is missing on a machine without a GPU.

No test runs an engine: tests/gpu does on a GPU, and every start of a server replays the probes.
"""

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
from sopdeploy.bundle.probes import Replay
from sopdeploy.errors import (
    ConfigError,
    LoweringError,
    ParityError,
    RuntimeUnavailableError,
    StorageError,
)
from sopdeploy_commands.app import app
from sopdeploy_commands.engine_builder import engine
from sopdeploy_commands.engine_builder.engine import EngineFile, get_engine
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.inference.loader import open_runtime
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
from tests.tensorrt.networks import write

OPTIONS = EngineOptions(profiles="1,4,16")
H200 = Gpu(name="NVIDIA H200", architecture="sm_90", memory=2**30)
B200 = Gpu(name="NVIDIA B200", architecture="sm_100", memory=2**30)
WRONG = ParityError("reference outputs: 'logits' deviates by 1")


class Machine:
    """A machine with TensorRT and a GPU, on which builds and replays have the outcomes that are set."""

    def __init__(self) -> None:
        self.tensorrt = SimpleNamespace(__version__="11.1.0")
        self.gpu = H200
        self.plans = 0  # that were built
        self.outcomes: list[Exception] = []  # of the next replays; then they succeed
        self.deviation = 0.25  # of the logits, whose tolerance is 0.5

    def build(self, *_: object) -> bytes:
        self.plans += 1
        return b"plan %d" % self.plans

    def replay(self, *arguments: Any) -> tuple[Replay, ...]:
        if self.outcomes:
            raise self.outcomes.pop(0)
        accepted = arguments[5] if len(arguments) > 5 else {}
        return tuple(
            Replay(
                batch=batch,
                num_images=3,
                deviation={"logits": deviation},
                tolerance={"logits": max(0.5, accepted.get("logits", 0.0))},
                num_changed=int(deviation > 0.5),
            )
            for batch, deviation in ((1, self.deviation / 2), (16, self.deviation))
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(engine, "import_tensorrt", lambda: machine.tensorrt)
    monkeypatch.setattr(engine, "open_cuda", lambda: SimpleNamespace(gpu=lambda: machine.gpu))
    monkeypatch.setattr(engine, "parse_and_build", machine.build)
    monkeypatch.setattr(engine, "replay_probes", machine.replay)
    return machine


@pytest.fixture
def built(machine: Machine, bundle: Bundle) -> EngineFile:
    return get_engine(bundle, OPTIONS)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["engine", *map(str, arguments)])


def load(built: EngineFile, bundle: Bundle, tensorrt: str = "11.1.0") -> StoredEngine | str:
    """Load the engine that a server on the H200 uses, as its runtime does."""
    return load_engine(built.path.parent, key_fields(bundle, tensorrt, H200))


def test_an_engine_is_built_once_beside_the_bundle(
    built: EngineFile, machine: Machine, bundle: Bundle, tmp_path: Path
) -> None:
    assert built.reason is not None
    assert [str(profile) for profile in built.record.key.profiles] == ["1", "2-4", "5-16"]

    cached = get_engine(bundle, OPTIONS)
    assert machine.plans == 1
    assert cached.reason is None
    assert cached.record == built.record
    assert built.path.parent == tmp_path / "engines" / bundle.name
    assert not list(tmp_path.rglob("*.partial"))

    written = built.path.with_suffix(".json").read_text()
    assert EngineRecord.model_validate_json(written) == built.record
    assert str(tmp_path) not in written


def test_torch_tensorrt_builds_one_profile_of_all_batch_sizes(
    machine: Machine, bundle: Bundle
) -> None:
    options = EngineOptions(profiles="1,4,16", via="torch-tensorrt")
    built = get_engine(bundle, options, build_via_torch=machine.build)

    assert [str(profile) for profile in built.record.key.profiles] == ["1-16"]


def test_an_engine_that_computes_something_else_is_not_kept(
    machine: Machine, bundle: Bundle, tmp_path: Path
) -> None:
    machine.outcomes = [WRONG]

    with pytest.raises(ParityError, match="deviates by"):
        get_engine(bundle, OPTIONS)
    assert not list(tmp_path.rglob("*.plan"))


def test_a_cached_engine_that_computes_something_else_is_built_again(
    built: EngineFile, machine: Machine, bundle: Bundle
) -> None:
    machine.outcomes = [WRONG]
    again = get_engine(bundle, OPTIONS)

    assert "'logits'" in again.reason
    assert (again.path, again.path.read_bytes()) == (built.path, b"plan 2")


def test_an_engine_beyond_the_tolerance_is_stored_only_if_allowed(
    machine: Machine, bundle: Bundle, tmp_path: Path
) -> None:
    machine.deviation = 0.75
    refused = run(bundle.path)
    assert (refused.exit_code, refused.stdout) == (2, "")
    for text in ("0.75", "0.5", "1 of 3 images", "--set allow_numerical_error=true"):
        assert text in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.plan"))

    allowed = run(bundle.path, "--set", "allow_numerical_error=true")
    assert allowed.exit_code == 0, allowed.stderr
    assert "accepted" in allowed.stdout
    (path,) = tmp_path.rglob("*.plan")
    record = EngineRecord.model_validate_json(path.with_suffix(".json").read_text())
    assert record.accepted_errors == {"logits": 1.5}
    assert [each.deviation["logits"] for each in record.replays] == [0.375, 0.75]
    assert [each.tolerance["logits"] for each in record.replays] == [0.5, 0.5]
    assert record.replays[1].num_changed == 1

    # In the cache, it may have this error, but not a larger one.
    assert get_engine(bundle, EngineOptions()).reason is None
    machine.deviation = 1.75
    with pytest.raises(ParityError, match=r"1\.75"):
        get_engine(bundle, EngineOptions())


def test_an_engine_within_the_tolerance_records_no_accepted_error(
    machine: Machine, bundle: Bundle
) -> None:
    built = get_engine(bundle, EngineOptions(allow_numerical_error=True))
    written = built.path.with_suffix(".json").read_text()

    assert "accepted_errors" not in written
    assert "num_changed" not in written


def test_outputs_that_are_not_finite_are_always_refused(
    machine: Machine, bundle: Bundle, tmp_path: Path
) -> None:
    machine.outcomes = [WRONG]

    with pytest.raises(ParityError):
        get_engine(bundle, EngineOptions(allow_numerical_error=True))
    assert not list(tmp_path.rglob("*.plan"))


def test_a_bundle_that_is_quantized_for_cpus_is_refused(bundle: Bundle) -> None:
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"int8_for": "cpu"}))
    with pytest.raises(LoweringError, match="int8_for=tensorrt"):
        get_engine(other, OPTIONS)


TENSORRT = SimpleNamespace(__version__="11.1.0")
NO_DRIVER = SimpleNamespace(
    cudaGetDeviceCount=lambda: (type("Status", (int,), {"name": "cudaErrorNoDevice"})(100), 0)
)
MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "no TensorRT": ({"tensorrt": None}, r"\.\[tensorrt\]"),
    "TensorRT 10": ({"tensorrt": SimpleNamespace(__version__="10.16.0")}, "10.16.0"),
    "no cuda-python": ({"tensorrt": TENSORRT, "cuda.bindings.runtime": None}, "cuda-python"),
    "no driver": (
        {"tensorrt": TENSORRT, "cuda.bindings.runtime": NO_DRIVER},
        "cudaGetDeviceCount",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_without_tensorrt_or_a_gpu_the_error_is_one_line(
    case: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, message = MISSING[case]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    done = run(bundle.path)

    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)


def use_engine_of_another_bundle(built: EngineFile, folder: Path) -> None:
    other = get_engine(write(folder / "other", config={"width": 5}), OPTIONS)
    assert other.record.key.name != built.record.key.name
    for suffix in (".plan", ".json"):
        shutil.copy(other.path.with_suffix(suffix), built.path.with_suffix(suffix))


CHANGES: dict[str, tuple[Callable[[EngineFile, Path], object], str]] = {
    "damaged": (lambda built, _: built.path.write_bytes(b"x"), "sha256"),
    "missing": (lambda built, _: built.path.unlink(), "is missing"),
    "of another bundle": (use_engine_of_another_bundle, "no engine"),
    "with an invalid record": (
        lambda built, _: built.path.with_suffix(".json").write_bytes(b"{}"),
        "no engine",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_plan_that_was_changed_is_not_loaded(
    case: str, built: EngineFile, bundle: Bundle, tmp_path: Path
) -> None:
    change, reason = CHANGES[case]
    change(built, tmp_path)

    assert reason in str(load(built, bundle))
    assert reason in str(get_engine(bundle, OPTIONS).reason)
    assert isinstance(load(built, bundle), StoredEngine)


MACHINES: dict[str, tuple[dict[str, Any], str, str]] = {
    "another TensorRT": (
        {"tensorrt": SimpleNamespace(__version__="11.4.0")},
        "1,4,16",
        "tensorrt 11.1.0, not 11.4.0",
    ),
    "another GPU": (
        {"gpu": B200},
        "1,4,16",
        "gpu NVIDIA H200, not NVIDIA B200; architecture sm_90, not sm_100",
    ),
    "other profiles": ({}, "1,8", "profiles 1,2-4,5-16, not 1,2-8"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_another_machine_or_other_profiles_get_their_own_engine(
    case: str, built: EngineFile, machine: Machine, bundle: Bundle
) -> None:
    changes, profiles, difference = MACHINES[case]
    vars(machine).update(changes)
    again = get_engine(bundle, EngineOptions(profiles=profiles))

    assert again.reason.endswith(difference)
    assert built.path.is_file()


def test_the_server_uses_the_engine_with_the_largest_batch(
    built: EngineFile, bundle: Bundle
) -> None:
    get_engine(bundle, EngineOptions(profiles="1,8"))

    assert load(built, bundle) == StoredEngine(b"plan 1", built.record)
    assert "11.1.0" in str(load(built, bundle, "11.4.0"))


def test_the_command_builds_an_engine_and_then_uses_the_cache(
    machine: Machine, bundle: Bundle
) -> None:
    first = run(bundle.path)

    assert first.exit_code == 0, first.stderr
    assert "precision fp32" in first.stdout
    assert "batch 16: logits" in first.stdout
    assert "in the cache" in run(bundle.path).stdout
    assert machine.plans == 1


def test_engines_are_built_in_the_cache_and_found_beside_the_bundle(
    machine: Machine, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPDEPLOY_ENGINE_CACHE", str(tmp_path / "cache"))
    plan = Path(json.loads(run(bundle.path, "--json").stdout)["plan"])
    assert plan.is_relative_to(tmp_path / "cache")
    settings = load_settings(runtime="tensorrt")

    assert engine_folders(bundle, settings) == [plan.parent]
    shutil.copytree(plan.parent, cache_folder(bundle))
    assert engine_folders(bundle, settings) == [plan.parent, cache_folder(bundle)]
    shutil.rmtree(plan.parent)

    assert engine_folders(bundle, settings) == [cache_folder(bundle)]
    other = get_engine(bundle, EngineOptions(cache=tmp_path / "mine"))
    assert other.path.is_relative_to(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        get_engine(bundle, EngineOptions(cache=tmp_path / "file"))


def test_the_container_image_keeps_engines_where_compose_mounts_a_volume() -> None:
    root = Path(__file__).parents[2]
    text = (root / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search("^VOLUME", text, re.MULTILINE)  # each run would leave one

    (folder,) = re.findall(r"SOPDEPLOY_ENGINE_CACHE=(\S+)/engines", text)
    assert f"engines:{folder}\n" in (root / "compose.yaml").read_text(encoding="utf-8")


def test_auto_chooses_an_existing_engine_and_never_falls_back_to_the_cpu(
    machine: Machine,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", TENSORRT)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", NO_DRIVER)
    assert open_runtime(bundle, Settings(runtime="auto")).device == "cpu"
    get_engine(bundle, OPTIONS)
    with pytest.raises(RuntimeUnavailableError, match="no NVIDIA GPU"):
        open_runtime(bundle, Settings(runtime="auto"))

    assert open_runtime(bundle, Settings(runtime="onnxruntime-cpu")).device == "cpu"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert open_runtime(bundle, Settings(runtime="auto")).device == "cpu"
    assert "TensorRT is not installed" in caplog.text


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
